"""Verify a bundle: choose texts, open every decoder graph, and run all checks against the reference."""

from __future__ import annotations

import ctypes
import gc
import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chameleon_deploy.contract.bundle import Bundle, LimitsSpec, Mode, ParitySummary
from chameleon_deploy.errors import InputError
from chameleon_deploy.terminal.progress import Progress

if TYPE_CHECKING:
    from chameleon_deploy.reference.adapters import AdaptedBase
    from chameleon_deploy.reference.source import Source
    from chameleon_deploy.verify.gates import Check

NUM_ROWS, MAX_TOKENS = 32, 48
LONGEST = 2048  # tokens of the one long text; a model with more positions is checked up to this length
# A reduced precision moves the perplexity of a thousand tokens by chance, by more than its gate, so it is measured on
# more: windows of the length that its gate was measured on.
WINDOWS, WINDOW_TOKENS = 24, 256
TRIMMED = 2**22  # parameters whose memory is worth a collection, which walks every object of PyTorch for half a second
QUICK_SECONDS = 60  # after which a quick verification begins no step
QUICK_WORK = 5e11  # tokens times parameters that it reads: a few seconds of two cores
QUICK_ROWS, QUICK_WINDOWS = 8, 3  # the fewest rows beside the long one; the most windows


@dataclass(frozen=True)
class VerifyOptions:
    """What a bundle is verified on, and how.

    text        files of text; None takes Python's own documentation
    threads     of ONNX Runtime; None takes all cores
    provider    the graph of another one than the CPU, instead of every decoder graph of the CPU
    keep_trunk  False frees the reference's layers before a session takes as much memory for the bundle's, unless
                hidden states depend on factors: those of adapters, or of targets beyond the head
    max_kl      accept a mean KL up to this value; None keeps the gates
    quick       read as many texts as QUICK_WORK allows, and begin no step after QUICK_SECONDS; checks name what is left
                out
    longest     tokens of the longest text, if the model has as many positions
    """

    text: list[Path] | None = None
    threads: int | None = None
    provider: str = "cpu"
    keep_trunk: bool = True
    max_kl: float | None = None
    quick: bool = False
    longest: int = LONGEST


def verification_rows(
    checkpoint: Source, text: list[Path] | None = None, more: bool = False, longest: int = LONGEST
) -> list[list[int]]:
    """Return 32 ragged texts of 1 to 48 tokens and, at last, one as long as the model's positions, at most `longest`.

    They are from files or from Python's own documentation, and begin with the special tokens that tokenizer.json puts
    before a text.

    more  and between them up to 24 windows of 256 tokens, each of one kind of text, the kinds in turn

    Raises InputError if the files have too little text.
    """
    from chameleon_deploy.reference.corpus import prefix_ids

    kinds = _kinds_of_text(text)
    texts = _in_turn(kinds)  # so that a batch has several clusters
    tokenizer = checkpoint.trunk.tokenizer
    encoded = [e.ids for e in tokenizer.encode_batch(texts, add_special_tokens=False) if e.ids]
    stream = [i for ids in encoded for i in ids]
    positions = min(checkpoint.trunk.max_positions, longest)
    if len(encoded) < NUM_ROWS or len(stream) < positions:
        raise InputError(
            f"verification needs at least {NUM_ROWS} texts and {positions} tokens, got {len(encoded)} and {len(stream)}"
        )
    most = min(MAX_TOKENS, positions)
    lengths = [most * (3 * row % NUM_ROWS + 1) // NUM_ROWS or 1 for row in range(NUM_ROWS)]
    first = prefix_ids(tokenizer)
    rows = [[*first, *ids][:n] for ids, n in zip(encoded, lengths, strict=False)]
    if more:
        joined = tokenizer.encode_batch(["\n\n".join(kind) for kind in kinds], add_special_tokens=False)
        width = min(WINDOW_TOKENS, positions)
        windows = _in_turn([_windows(e.ids, WINDOWS // len(kinds), width) for e in joined])
        rows += [[*first, *ids][:width] for ids in windows]
    return [*rows, [*first, *stream][:positions]]


def _kinds_of_text(text: list[Path] | None) -> list[list[str]]:
    """Return the texts to verify on: of files, or of Python's own documentation, in its kinds."""
    from chameleon_deploy.reference.python_corpus import KINDS, python_texts
    from chameleon_deploy.terminal.texts import read_texts

    return [read_texts(text)] if text else [python_texts(kind, 100) for kind in KINDS]


def _in_turn(kinds: Sequence[Sequence[Any]]) -> list[Any]:
    """Return the first of every kind, then the second, and so on."""
    return [one for group in itertools.zip_longest(*kinds) for one in group if one]


def _windows(stream: list[int], count: int, width: int) -> list[list[int]]:
    """Return up to `count` windows, evenly spaced and apart."""
    count = min(count, len(stream) // width)
    return [stream[start : start + width] for start in (len(stream) * i // count for i in range(count))]


def _fewer(rows: list[list[int]], parameters: int) -> list[list[int]]:
    """Return the first rows, a few windows among them, and the beginning of the long row: what QUICK_WORK allows of a
    model with so many parameters, and at least 9 rows.
    """
    *others, longest = rows
    tokens = int(QUICK_WORK / parameters)
    beginning = longest[: max(1, min(WINDOW_TOKENS, tokens // 2))]
    read = itertools.accumulate(map(len, others), initial=len(beginning))
    count = sum(total <= tokens for total in itertools.islice(read, 1, None))
    return [*others[: min(max(count, QUICK_ROWS), NUM_ROWS + QUICK_WINDOWS)], beginning]


def _texts_left_out(rows: list[list[int]], read: list[list[int]]) -> Check:
    """Return how many tokens a quick verification does not read."""
    from chameleon_deploy.verify.gates import Check

    note = f"not read: {len(rows) - len(read)} of {len(rows)} texts, and all after {len(read[-1])} tokens of the long"
    return Check("left out: tokens of texts", sum(map(len, rows)) - sum(map(len, read)), limit=None, note=note)


def rows_within(rows: list[list[int]], limits: LimitsSpec) -> list[list[int]]:
    """Select as many rows as engines take in one batch with a factor set for each, cut to the longest that they take.

    The longest row is the last.
    """
    most = min(limits.batch, limits.factor_sets, len(rows))
    longest = max(range(len(rows)), key=lambda row: len(rows[row]))
    others = [ids for row, ids in enumerate(rows) if row != longest]
    return [ids[: limits.sequence] for ids in (*others[: most - 1], rows[longest])]


def verify_bundle(
    bundle: Path,
    checkpoint: Source,
    report: Progress,
    options: VerifyOptions = VerifyOptions(),
) -> tuple[list[Check], dict[str, Any]]:
    """Run every check.

    Returns the checks and the content of parity.json.
    """
    from chameleon_deploy.contract.bundle import default_mode, open_bundle
    from chameleon_deploy.reference.adapters import AdaptedBase, AdapterLogits
    from chameleon_deploy.reference.inference import RowLogits
    from chameleon_deploy.reference.targets import in_head_alone
    from chameleon_deploy.runtime import Runtime, load
    from chameleon_deploy.runtime.known_answers import recorded_answers
    from chameleon_deploy.runtime.providers import open_cpu
    from chameleon_deploy.verify import checkpoint_checks
    from chameleon_deploy.verify.adapter_checks import random_adapters, verify_adapters
    from chameleon_deploy.verify.data_checks import check_tokenizers

    opened, provider, max_kl = open_bundle(bundle), options.provider, options.max_kl
    manifest, own = opened.manifest, opened.graph("decoder", "cpu")
    rows = verification_rows(checkpoint, options.text, manifest.precision != "fp32", options.longest)
    until, left_out = math.inf, []
    if options.quick:
        until, every, rows = time.monotonic() + QUICK_SECONDS, rows, _fewer(rows, manifest.parameters.base)
        left_out = [_texts_left_out(every, rows)]
    if provider != "cpu":
        rows = rows_within(rows, manifest.limits)
    verify: Callable[..., list[Check]]
    reference: Any  # of what `verify` takes
    if isinstance(checkpoint, AdaptedBase):
        _require_adapters(opened, checkpoint)
        if not checkpoint.adaptable:  # the bundle says what adapters may be loaded later
            targets = tuple(target.name for target in manifest.adaptation.targets)
            checkpoint = replace(checkpoint, adaptable=targets, max_rank=manifest.adaptation.rank)
        factors_in_trunk, modes = bool(checkpoint.targets), list[Mode](["none"])
        verify = verify_adapters
        reference = AdapterLogits(
            random_adapters(checkpoint) if checkpoint.targets and not checkpoint.adapters else checkpoint
        )
    else:
        factors_in_trunk = not in_head_alone(checkpoint.config.targets)
        modes = checkpoint_checks.compared_modes(manifest.adaptation)
        verify, reference = checkpoint_checks.verify_checkpoint, RowLogits(checkpoint)
    if not factors_in_trunk:
        known = [ids for mode in modes for ids in checkpoint_checks.continued_rows(recorded_answers(opened), mode)]
        for done, ids in enumerate([*rows, *known]):
            report("verify: reference", done, len(rows) + len(known))
            reference.read(ids)
        if not options.keep_trunk:
            checkpoint.trunk.drop_layers()
            _trim_memory(manifest.parameters.base)
    run = partial(verify, reference=reference, rows=rows, report=report, max_kl=max_kl, until=until)
    texts = _in_turn(_kinds_of_text(options.text))
    checks = [*left_out, *(replace(check, graph=own) for check in check_tokenizers(checkpoint.trunk, texts))]
    integer_weights: str | None = None
    if provider == "cpu":
        decoders = [
            name for name, graph in manifest.graphs.items() if graph.role == "decoder" and "cpu" in graph.providers
        ]
        # The one that this processor uses comes first: a quick verification may not reach another.
        for name in sorted(decoders, key=lambda name: name != own):
            runtime = Runtime(opened, open_cpu(opened, options.threads, graph=name))
            checks += run(runtime, whole=name == own)
            integer_weights = integer_weights or runtime.integer_weights
            del runtime  # one session's weights at a time
            _trim_memory(manifest.parameters.base)
    else:
        runtime = load(bundle, provider, threads=options.threads)
        provider, integer_weights = runtime.provider, runtime.integer_weights
        checks += run(runtime, whole=True)
    record = {
        "provider": provider,
        "verified": all(check.passed for check in checks),
        "mode": default_mode(manifest.adaptation),
        "precision": manifest.precision,
        "integer_weights": integer_weights,
        "accepted_kl": max_kl,
        "quick": options.quick,
        "texts": len(rows),
        "tokens": sum(map(len, rows)),
        "checks": [{**asdict(check), "passed": check.passed} for check in checks],
    }
    return checks, record


def _trim_memory(parameters: int) -> None:
    """Return the freed memory of so many parameters to the system. glibc keeps it, of a closed session more than a
    gigabyte (malloc_trim(3)).
    """
    if parameters < TRIMMED:
        return
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # other C libraries have none
    if trim is not None:
        trim(0)


def _require_adapters(bundle: Bundle, base: AdaptedBase) -> None:
    """Raise InputError unless the adapters and the base that are named are those of the bundle."""
    spec = bundle.manifest.adaptation
    if set(spec.adapters) != set(base.adapters):
        ours, theirs = (", ".join(adapters) or "none" for adapters in (spec.adapters, base.adapters))
        raise InputError(f"the bundle's adapters are {ours}, not {theirs}: pass --adapter NAME=DIR for each")
    if spec.base_digest != base.base_digest:
        raise InputError(f"{base.name} is not the base model that the bundle was exported from")


def summary(checks: list[Check], max_kl: float | None = None) -> ParitySummary:
    """Summarise checks for the manifest."""
    from chameleon_deploy.verify.logit_figures import largest

    differences = [
        check.value
        for check in checks
        if check.name.startswith(("x1 factors: logits", "mixed adapters: logits", "base model: logits"))
    ]
    return ParitySummary(all(check.passed for check in checks), len(checks), largest(differences), max_kl)
