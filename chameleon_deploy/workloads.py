"""What `bench` times: the same work through the bundle, through PyTorch, and through the bundle used otherwise.

bundle                 as users run it: rows of all clusters in one call
PyTorch eager          the reference
no adaptation          the bundle in mode none: what the adaptation costs
one call per cluster   the bundle as the paper does it: what the mixed call saves
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache

from chameleon_deploy.measurement import Case, median_seconds
from chameleon_deploy.reference import inference
from chameleon_deploy.reference.checkpoint import Checkpoint
from chameleon_deploy.reference.model import adapted_logits
from chameleon_deploy.reference.python_corpus import KINDS, python_texts
from chameleon_deploy.runtime import Adaptation, Runtime, Sampling
from chameleon_deploy.runtime.adaptation import assign, embed
from chameleon_deploy.runtime.decoder import greedy
from chameleon_deploy.runtime.sampling import choose

Rows = list[list[int]]
EAGER, PLAIN, SEPARATE = "PyTorch eager", "no adaptation", "one call per cluster"


def scoring(runtime: Runtime, checkpoint: Checkpoint, rows: Rows) -> Case:
    """Log-probabilities of whole texts, clustering and hypernetwork included."""

    def eager() -> Any:
        logits = _eager_logits(checkpoint, inference.adapt(checkpoint, rows, runtime.mode), torch.tensor(rows))
        return logits[:, :-1].log_softmax(-1).gather(2, torch.tensor(rows)[:, 1:, None])[..., 0].numpy()

    engines = {
        "bundle": lambda: _logprobs(runtime.score(rows)),
        EAGER: eager,
        PLAIN: lambda: _logprobs(runtime.score(rows, mode="none")),
    }
    name, (num_bytes, num_flops) = f"scoring {len(rows)}x{len(rows[0])}", _work(runtime, rows, all_logits=True)
    return Case(name, engines, _tokens(rows), "token", num_bytes, num_flops, different=(PLAIN,))


def prefill(runtime: Runtime, checkpoint: Checkpoint, rows: Rows) -> Case:
    """Prompts to the logits of the first token, clustering and hypernetwork included."""
    width = len(rows[0])

    def eager() -> Any:
        adaptation = inference.adapt(checkpoint, rows, runtime.mode)
        return _eager_logits(checkpoint, adaptation, torch.tensor(rows), DynamicCache(), last=True)[:, -1].numpy()

    engines = {
        "bundle": lambda: np.asarray(runtime.decoder.prefill(rows, runtime.adapt(rows), width)[0]),
        EAGER: eager,
        PLAIN: lambda: np.asarray(runtime.decoder.prefill(rows, runtime.adapt(rows, mode="none"), width)[0]),
    }
    name, (num_bytes, num_flops) = f"prefill {len(rows)}x{width} + first token", _work(runtime, rows, all_logits=False)
    return Case(name, engines, _tokens(rows), "token", num_bytes, num_flops, different=(PLAIN,))


def decoding(runtime: Runtime, checkpoint: Checkpoint, rows: Rows, steps: int) -> Case:
    """Cached steps after the rows; every engine is fed the same tokens, whatever it would choose."""
    adaptation, none = runtime.adapt(rows), runtime.adapt(rows, mode="none")
    tokens = np.array(rows)[:, :steps]
    members = [np.flatnonzero(adaptation.factor_ids == c) for c in range(len(adaptation.lora_A))]
    separate = [_steps(runtime, [rows[i] for i in m], tokens[m], _own_set(adaptation, m)) for m in members]

    def one_call_per_cluster() -> Any:
        logits = np.empty((len(rows), runtime.manifest.model.vocab_size), np.float32)
        for indices, run in zip(members, separate, strict=True):
            logits[indices] = run()
        return logits

    engines = {
        "bundle": _steps(runtime, rows, tokens, adaptation),
        EAGER: _eager_steps(checkpoint, rows, tokens, inference.adapt(checkpoint, rows, runtime.mode)),
        PLAIN: _steps(runtime, rows, tokens, none),
    }
    if len(members) > 1:
        engines[SEPARATE] = one_call_per_cluster
    name = f"decoding, batch {len(rows)}, past {len(rows[0])}, {len(members)} cluster{'s' * (len(members) > 1)}"
    num_bytes, num_flops = _work(runtime, [[0]] * len(rows), all_logits=True)
    model = runtime.manifest.model
    num_bytes += 4 * 2 * model.num_layers * model.num_key_value_heads * model.head_dim * _tokens(rows)  # the cache
    return Case(name, engines, steps, "step", steps * num_bytes, steps * num_flops, different=(PLAIN,))


def text_rows(checkpoint: Checkpoint, batch: int, width: int) -> Rows:
    """Stretches of real text of `width` tokens; the kinds take turns, so that a batch has several clusters."""
    streams = []
    for kind in KINDS:
        encoded = checkpoint.trunk.tokenizer.encode_batch(python_texts(kind)[:200], add_special_tokens=False)
        if stream := [i for encoding in encoded for i in encoding.ids]:
            streams.append(stream)
    rows = []
    for i in range(batch):
        stream = streams[i % len(streams)]
        rows.append([stream[(i * width + j) % len(stream)] for j in range(width)])
    return rows


def _work(runtime: Runtime, rows: Rows, all_logits: bool) -> tuple[float, float]:
    """Bytes that one pass has to read (every weight once) and the operations of its matrix products.

    Attention scores are left out: at these widths they are a few percent.
    """
    model, parameters = runtime.manifest.model, runtime.manifest.parameters
    head = model.vocab_size * model.hidden_size
    trunk = parameters.base - head - model.max_positions * model.hidden_size
    return 4 * (trunk + head), 2 * (trunk * _tokens(rows) + head * (_tokens(rows) if all_logits else len(rows)))


def _steps(runtime: Runtime, rows: Rows, tokens: Any, adaptation: Adaptation) -> Callable[[], Any]:
    steps = tokens.shape[1]
    _, cache = runtime.decoder.prefill(rows, adaptation, len(rows[0]) + steps)
    lengths = cache.lengths

    def run() -> Any:
        cache.lengths = lengths  # the shared buffer is written over from here
        for step in range(steps):
            logits = runtime.decoder.step(tokens[:, step], adaptation, cache)
            greedy(logits)
        return np.array(logits)

    return run


def _eager_steps(
    checkpoint: Checkpoint, rows: Rows, tokens: Any, adaptation: inference.ReferenceAdaptation
) -> Callable[[], Any]:
    steps, cache = tokens.shape[1], DynamicCache()
    checkpoint.trunk.hidden_states(torch.tensor(rows), None, cache)

    def run() -> Any:
        for step in range(steps):
            logits = _eager_logits(checkpoint, adaptation, torch.from_numpy(tokens[:, step : step + 1]), cache)
            logits.argmax(-1)
        cache.crop(-steps)
        return logits[:, -1].numpy()

    return run


@torch.no_grad()
def _eager_logits(
    checkpoint: Checkpoint,
    adaptation: inference.ReferenceAdaptation,
    input_ids: torch.Tensor,
    cache: Any = None,
    last: bool = False,
) -> torch.Tensor:
    hidden, _ = checkpoint.trunk.hidden_states(input_ids, None, cache)
    hidden = hidden[:, -1:] if last else hidden
    alpha, weight = checkpoint.config.alpha, checkpoint.trunk.head_weight
    return adapted_logits(hidden, weight, adaptation.lora_A, adaptation.lora_B, alpha, adaptation.factor_ids)


def _own_set(adaptation: Adaptation, members: Any) -> Adaptation:
    """Rows of one cluster with that cluster's factors alone."""
    own = adaptation.rows(members)
    c = int(own.factor_ids[0])
    sets = slice(c, c + 1)
    return Adaptation(
        own.embeddings, own.cluster_ids, own.lora_A[sets], own.lora_B[sets], np.zeros(len(members), np.int64)
    )


def _logprobs(scores: Any) -> Any:
    return np.array([score.token_logprobs for score in scores])


def _tokens(rows: Rows) -> int:
    return sum(map(len, rows))


def cost_split(runtime: Runtime, checkpoint: Checkpoint, rows: Rows, steps: int) -> dict[str, float]:
    """Seconds of the parts of one generation: medians of several runs of each part alone."""
    texts = checkpoint.trunk.tokenizer.decode_batch(rows)
    spec, model, bundle = runtime.manifest.adaptation, runtime.manifest.model, runtime.bundle
    table, centroids = bundle.token_embedding(), bundle.centroids()
    adaptation = runtime.adapt(rows)
    vectors = adaptation.embeddings[: len(adaptation.lora_A)]
    logits = np.asarray(runtime.decoder.prefill(rows, adaptation, len(rows[0]))[0])
    step = _steps(runtime, rows, np.array(rows)[:, :steps], adaptation)
    parts: dict[str, Callable[[], object]] = {
        "tokenise": lambda: runtime.tokenizer.encode_batch(texts, add_special_tokens=False),
        "embed and cluster": lambda: assign(embed(rows, table, spec, model.eos_token_id), centroids),
        "prefill": lambda: runtime.decoder.prefill(rows, adaptation, len(rows[0])),
        f"decode, {steps} steps": step,
        f"choose, {steps} steps": lambda: [
            choose(row, np.array([0]), Sampling(), 0.0) for _ in range(steps) for row in logits
        ],
    }
    if spec.regime == "chameleon":
        parts["hypernetwork"] = lambda: runtime._generate_factors(vectors)
    return {name: median_seconds(part) for name, part in parts.items()}
