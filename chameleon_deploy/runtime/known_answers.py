"""Known answers: what a bundle computes of a few texts, which export records and `verify --here` compares.

A machine whose kernels round or saturate otherwise gives other answers without an error. A known-answer test, as
cryptographic modules run one before they serve (FIPS 140-3), finds that out without the reference model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np

from chameleon_deploy.contract.bundle import AdaptationSpec, Bundle, LimitsSpec, Mode, ModelSpec
from chameleon_deploy.errors import ManifestError
from chameleon_deploy.runtime.adaptation import Adapt
from chameleon_deploy.runtime.decode.shared_cache import SharedCacheDecoder
from chameleon_deploy.runtime.generation import Generate
from chameleon_deploy.runtime.runtime import Runtime
from chameleon_deploy.runtime.sampling_settings import Sampling
from chameleon_deploy.runtime.tokenizer import encode_batch

PARITY, FIELD = "parity.json", "known_answers"  # the file and its field
TEXTS = (
    "The river runs through the valley, and in spring it carries the snow of the mountains down to the sea. Nobody in "
    "the village remembers a winter without it.",
    "def read(path):\n    with open(path) as file:\n        return [line.strip() for line in file if line != '\\n']\n",
    "In 1969 two computers, 560 km apart, exchanged the first message of a network: it ended after 2 letters, 'lo'.",
    "Schöne Grüße aus Zürich — 東京は晴れ, в Москве снег, ¿y en Bogotá? 😀 It was 3.50 € for 1/2 kg.",
)
MAX_TOKENS = 64  # of a text
NEW_TOKENS = 8  # that each text is continued by
HIDDEN_VALUES = 32  # of the last hidden state of a text, the first ones


class ModeAnswers(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The recorded results of all texts in one adaptation mode.

    token_logprobs  of every token of a text after its first, as `Runtime.score` returns them
    greedy          NEW_TOKENS token ids that continue a text, fewer where the model's positions end
    gaps            of each of them, by how much its log-probability exceeds the second highest
    """

    token_logprobs: list[list[float]]
    greedy: list[list[int]]
    gaps: list[list[float]]


class KnownAnswers(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The recorded answers of a bundle.

    graph          the decoder graph that computed them
    texts          encoded by the bundle's tokenizer
    token_ids      of each text, whole
    rows           what the model reads of each text
    hidden_states  in mode none, the first HIDDEN_VALUES of the last hidden state of each row; empty where the decoder
                   returns none
    modes          answers by adaptation mode
    """

    graph: str
    texts: list[str]
    token_ids: list[list[int]]
    rows: list[list[int]]
    hidden_states: list[list[float]]
    modes: dict[Mode, ModeAnswers]


def known_answers(runtime: Runtime) -> KnownAnswers:
    """Compute what is recorded."""
    token_ids = encoded(runtime, TEXTS)
    rows = _rows(token_ids, runtime.manifest.model, runtime.manifest.limits)
    modes: dict[Mode, ModeAnswers] = {}
    for mode in _modes(runtime.manifest.adaptation):
        adapt = adapt_rows(runtime, mode, len(rows))
        logged = runtime.generate(rows, _greedy(NEW_TOKENS, logprobs=2), adapt)
        greedy = [row.token_ids for row in logged]
        gaps = [[_rounded(first - second) for (_, first), (_, second) in row.top_logprobs or ()] for row in logged]
        modes[mode] = ModeAnswers(token_logprobs(runtime, rows, adapt), greedy, gaps)
    return KnownAnswers(runtime.graph, list(TEXTS), token_ids, rows, hidden_states(runtime, rows) or [], modes)


def recorded_answers(bundle: Bundle) -> KnownAnswers:
    """Return the answers in a bundle's parity.json.

    Raises ManifestError if there are none, as in bundles of earlier releases, or if they do not fit the bundle.
    """
    file = bundle.path / PARITY
    try:
        parity = msgspec.json.decode(file.read_bytes(), type=dict[str, Any])
        if FIELD not in parity:
            raise ManifestError(f"{file} has no {FIELD}: export the bundle again, which records them")
        answers = msgspec.convert(parity[FIELD], KnownAnswers)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ManifestError(f"{file}: {error}: export the bundle again") from error
    if fault := _fault(answers, _modes(bundle.manifest.adaptation)):
        raise ManifestError(f"{file}: {FIELD}: {fault}: export the bundle again")
    return answers


def encoded(runtime: Runtime, texts: Sequence[str]) -> list[list[int]]:
    """Return the token ids that the bundle's tokenizer gives texts."""
    return encode_batch(runtime.tokenizer, texts)


def hidden_states(runtime: Runtime, rows: Sequence[Sequence[int]]) -> list[list[float]] | None:
    """Return the first values of each row's last hidden state in mode none; None if the decoder returns none."""
    if not isinstance(runtime.decoder, SharedCacheDecoder):
        return None
    last: dict[int, list[float]] = {}
    for row, _, states in runtime.decoder.hidden_states(rows, runtime.adapt(rows, mode="none").factors):
        last[row] = [_rounded(value) for value in states[-1, :HIDDEN_VALUES].tolist()]
    return [last[row] for row in range(len(rows))]


def token_logprobs(runtime: Runtime, rows: Sequence[Sequence[int]], adapt: Adapt) -> list[list[float]]:
    """Return the scores of rows."""
    return [[_rounded(value) for value in score.token_logprobs] for score in runtime.score(rows, adapt)]


def continued(
    runtime: Runtime, rows: Sequence[Sequence[int]], adapt: Adapt, new_tokens: int | Sequence[int]
) -> list[list[int]]:
    """Return the greedy tokens that continue rows."""
    return [generation.token_ids for generation in runtime.generate(rows, _greedy(new_tokens), adapt)]


def adapt_rows(runtime: Runtime, mode: Mode, rows: int) -> Adapt:
    """Return how the recorded rows are adapted in a mode."""
    spec = runtime.manifest.adaptation
    if mode == "static" and spec.adapters:
        names = [*spec.adapters, None]
        return Adapt(adapters=[names[row % len(names)] for row in range(rows)])
    if mode == "tenant":
        return Adapt(mode, tenants=[row % 2 for row in range(rows)])
    if mode == "request" and spec.conditioning_size:
        vectors = np.zeros((rows, spec.conditioning_size), np.float32)
        vectors[range(rows), np.arange(rows) % spec.conditioning_size] = 1
        return Adapt(mode, conditioning=vectors)
    return Adapt(mode)


def _modes(spec: AdaptationSpec) -> list[Mode]:
    """Return the modes that need no factors of a caller."""
    return [mode for mode in spec.modes if mode != "static" or spec.regime == "lora"]


def _rows(token_ids: Sequence[Sequence[int]], model: ModelSpec, limits: LimitsSpec) -> list[list[int]]:
    """Return what the model reads of texts: rows that engines take in one batch, with a factor set for each."""
    longest = max(1, min(MAX_TOKENS, limits.sequence, model.max_positions - NEW_TOKENS + 1))
    known = [[i for i in ids if i < model.vocab_size][:longest] or [model.eos_token_id] for ids in token_ids]
    return known[: min(limits.batch, limits.factor_sets)]


def _fault(answers: KnownAnswers, modes: Sequence[Mode]) -> str | None:
    """Return what does not fit together, or None."""
    if not answers.rows or len(answers.texts) != len(answers.token_ids):
        return "texts, token ids and rows differ in number"
    for mode, found in answers.modes.items():
        if mode not in modes:
            return f"it has answers of mode {mode!r}, which this bundle cannot give"
        if [len(values) + 1 for values in found.token_logprobs] != [len(ids) for ids in answers.rows]:
            return f"mode {mode!r} has scores of other rows"
        tokens = [*map(len, found.greedy)]
        if len(tokens) != len(answers.rows) or [*map(len, found.gaps)] != tokens or not all(tokens):
            return f"mode {mode!r} has tokens of other rows"
    return None


def _greedy(new_tokens: int | Sequence[int], logprobs: int | None = None) -> Generate:
    return Generate(new_tokens, Sampling(ignore_eos=True, logprobs=logprobs))


def _rounded(value: float) -> float:
    """Return six digits of a number: the last bits depend on the machine."""
    return float(f"{value:.6g}")
