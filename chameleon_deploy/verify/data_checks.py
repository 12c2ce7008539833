"""Compare as data what a bundle and its reference both hold: figures of a few texts do not show every fault.

The end-of-text token, the tokenizer, the manifest's counts and every row of the head and of the token embedding are
compared one by one; the graphs without weights, which only devices run, are run here on logits with ties.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import msgspec
import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from chameleon_deploy.contract.bundle import HEAD, HEAD_BALANCE, Bundle, int8_names
from chameleon_deploy.contract.token_embedding import TokenEmbedding
from chameleon_deploy.reference.checkpoint import Checkpoint
from chameleon_deploy.reference.description import adaptation_spec, model_spec, parameter_counts
from chameleon_deploy.reference.model import Trunk
from chameleon_deploy.reference.source import Source
from chameleon_deploy.runtime.decode.session import open_session, run
from chameleon_deploy.verify.gates import Check, Gate
from chameleon_deploy.verify.logit_figures import largest, max_abs

OTHER_TOKENIZER = "texts that transformers' own tokenizer reads otherwise than tokenizer.json"
ROWS = 4096  # of a matrix that are compared at a time


def check_data(bundle: Bundle, source: Source, gate: Gate) -> Iterator[Check]:
    """Yield the checks of everything that is compared as data."""
    yield from check_manifest(bundle, source)
    yield from check_tokenizer(bundle, source.trunk.tokenizer)
    yield from check_rows(bundle, source, gate)
    yield from check_readout(bundle)


def check_manifest(bundle: Bundle, source: Source) -> Iterator[Check]:
    """The manifest describes the reference: its dimensions, its end-of-text token, its factors and its counts."""
    manifest, spec = bundle.manifest, adaptation_spec(source)
    yield _fields("manifest: fields of the model that differ", manifest.model, model_spec(source))
    yield _fields("manifest: fields of the adaptation that differ", manifest.adaptation, spec)
    yield _fields("manifest: counts of parameters that differ", manifest.parameters, parameter_counts(source, spec))
    yield _equal("manifest: digest of the checkpoint differs", manifest.checkpoint_digest, source.digest)
    if isinstance(source, Checkpoint):
        difference = max_abs(bundle.centroids(), source.centroids.numpy())
        yield Check("centroids, max abs difference", difference, 0, note=f"{len(source.centroids)} centroids")


def check_tokenizer(bundle: Bundle, tokenizer: Any) -> Iterator[Check]:
    """tokenizer.json is the reference's, entry by entry: texts may have none of the tokens that differ."""
    ours, theirs = json.loads((bundle.path / "tokenizer.json").read_bytes()), json.loads(tokenizer.to_str())
    parts = {"vocab": "entries of the vocabulary", "merges": "merges"}
    pairs = [(name, ours["model"].pop(field), theirs["model"].pop(field)) for field, name in parts.items()]
    pairs.append(("added tokens", ours.pop("added_tokens"), theirs.pop("added_tokens")))
    for name, found, expected in pairs:
        yield Check(f"tokenizer: {name} that differ", _differences(found, expected), 0, note=f"of {len(expected):,}")
    yield _equal("tokenizer: other settings differ", ours, theirs)


def check_tokenizers(trunk: Trunk, texts: Sequence[str]) -> Iterator[Check]:
    """Count texts whose token ids differ between tokenizer.json and transformers, which rebuilds some tokenizers.

    It is information: tokenizer.json decides, in the bundle as in the reference.
    """
    if trunk.transformers_tokenizer is not None:
        ours, theirs = (
            [encoding.ids for encoding in tokenizer.encode_batch(list(texts))]
            for tokenizer in (trunk.tokenizer, trunk.transformers_tokenizer)
        )
        differ = sum(a != b for a, b in zip(ours, theirs, strict=True))
        note = f"of {len(texts)}; the bundle is verified with tokenizer.json"
        yield Check(OTHER_TOKENIZER, differ, limit=None, note=note)


def check_rows(bundle: Bundle, source: Source, gate: Gate) -> Iterator[Check]:
    """Every row of the head, in every decoder graph, and of the token embedding is the reference's."""
    trunk, embedding = source.trunk, bundle.token_embedding()
    limit = gate.row_tolerance if embedding.int8 else 0
    yield _rows("token embedding", embedding, trunk.token_embedding, limit)
    for name, graph in bundle.manifest.graphs.items():
        if graph.role == "decoder":
            yield _rows(f"head of {name}", _head(bundle, graph.file), trunk.head_weight, gate.row_tolerance)


def check_readout(bundle: Bundle) -> Iterator[Check]:
    """The graphs that choose and score on a device, opened on the CPU: ties go to the lowest id."""
    vocab_size = bundle.manifest.model.vocab_size
    random = np.random.default_rng(0)
    logits = random.integers(-4, 5, (3, 5, vocab_size)).astype(np.float32)  # with many ties for the highest
    logits[0, 0, 1] = np.nan
    targets = random.integers(0, vocab_size, (3, 5))
    sessions = {
        role: open_session(bundle, bundle.manifest.graphs[bundle.graph(role, "cuda")], 1)
        for role in ("chooser", "logits_scorer")
    }
    (chosen,) = run(sessions["chooser"].run, ["token_ids"], {"logits": logits})
    expected = np.where(np.isnan(logits).any(-1), -1, logits.argmax(-1))
    yield Check("chooser: tokens that differ", float((chosen != expected).sum()), 0, note=f"{expected.size} positions")
    logits = np.nan_to_num(logits)
    (found,) = run(sessions["logits_scorer"].run, ["logprobs"], {"logits": logits, "targets": targets})
    logprobs = torch.from_numpy(logits).double().log_softmax(-1).gather(-1, torch.from_numpy(targets)[..., None])
    difference = max_abs(found, logprobs[..., 0].numpy())
    yield Check("logits_scorer: log-probabilities, max abs difference", difference, 1e-4)


def _fields(name: str, ours: msgspec.Struct, theirs: msgspec.Struct) -> Check:
    differ = [field for field in ours.__struct_fields__ if getattr(ours, field) != getattr(theirs, field)]
    return Check(name, len(differ), 0, note=", ".join(differ))


def _equal(name: str, ours: Any, theirs: Any) -> Check:
    return Check(name, float(ours != theirs), 0)


def _differences(ours: Any, theirs: Any) -> int:
    """Entries of one that are not the other's: of a dictionary, or of a list, in whose order they stand."""
    if isinstance(ours, list):
        ours, theirs = (dict(enumerate(entries)) for entries in (ours, theirs))
    return sum(key not in ours or key not in theirs or ours[key] != theirs[key] for key in ours.keys() | theirs.keys())


def _rows(name: str, found: TokenEmbedding, expected: Tensor, limit: float) -> Check:
    """The largest difference of a row, relative to the norm of the reference's."""
    worst = []
    for start in range(0, len(expected), ROWS):
        theirs = expected[start : start + ROWS].double()
        ours = torch.from_numpy(found.restore(found.rows(np.arange(start, start + len(theirs)))))
        worst.append(float(((ours - theirs).norm(dim=1) / theirs.norm(dim=1).clamp(min=1e-30)).max()))
    return Check(f"{name}: rows, largest relative difference", largest(worst), limit, note=f"{len(expected):,} rows")


def _head(bundle: Bundle, file: str) -> TokenEmbedding:
    """Return the rows of the head of a decoder graph, which in int8 are stored like those of the token embedding."""
    tensors = ir.load(bundle.path / file).graph.initializers
    int8, scale = int8_names(HEAD)
    if int8 in tensors and (looked_up := bundle.token_embedding().int8) is not None:
        rows, scales, channels = (_array(tensors[name]) for name in (int8, scale, HEAD_BALANCE))
        return TokenEmbedding(rows, replace(looked_up, rows=scales, channels=channels))
    name = next(name for name in (HEAD, f"{HEAD}.f16", f"{HEAD}.bf16") if name in tensors)
    return TokenEmbedding(_array(tensors[name]))


def _array(value: Any) -> Any:
    return value.const_value.numpy()
