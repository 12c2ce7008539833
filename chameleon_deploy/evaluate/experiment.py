"""The whole comparison: train every variant with several seeds under both protocols, score held-out texts in every way.

Everything that is finished stays in the work directory, so a run that was killed goes on where it was:

    settings.json                       what the run is made of
    hidden_states/{protocol}/{part}/    the trunk's output, computed once for all variants and seeds
    {protocol}/seed-{n}/{variant}/      a checkpoint
    {protocol}/seed-{n}/{variant}.safetensors    its scores: one tensor [texts] per protocol and conditioning
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file, save_file
from torch import Tensor

from chameleon_deploy.bundle import Protocol
from chameleon_deploy.directory import locked_directory
from chameleon_deploy.errors import InputError
from chameleon_deploy.evaluate import conditioning
from chameleon_deploy.evaluate.scoring import FloatArray, score_texts
from chameleon_deploy.evaluate.variants import (
    VARIANTS,
    Experiment,
    Variant,
    checkpoint_config,
    conditionings,
    num_parameters,
    usual,
)
from chameleon_deploy.progress import Progress
from chameleon_deploy.reference.checkpoint import load_checkpoint
from chameleon_deploy.reference.clustering import embed_texts, fit_centroids, nearest_centroids
from chameleon_deploy.reference.corpus import encode_texts, split_texts
from chameleon_deploy.reference.hidden_states import HiddenStates, cache_hidden_states
from chameleon_deploy.reference.model import Trunk
from chameleon_deploy.reference.presets import RECIPES
from chameleon_deploy.reference.training import train_on_states

PROTOCOLS: tuple[Protocol, ...] = ("paper", "masked")
STOPPING = 0.1  # of the training texts: they decide when to stop, so that the scored texts decide nothing


@dataclass(frozen=True)
class Scored:
    """One variant, trained under one protocol, scored by one with one conditioning.

    variant       "base" or a Variant's name; the base is trained under no protocol and has one "seed"
    nll           float64 [seeds, texts], in nats
    positions     int64 [texts]
    cluster_ids   int64 [texts], by the centroids of the training protocol
    """

    variant: str
    trained: Protocol
    scored: Protocol
    conditioning: str
    parameters: int
    nll: FloatArray
    positions: npt.NDArray[np.int64]
    cluster_ids: npt.NDArray[np.int64]


@dataclass(frozen=True)
class Outcome:
    """scored; histories[protocol, variant]: one list of epochs per seed; embeddings [texts, hidden] and centroids
    [K, hidden] of protocol masked, for the map."""

    scored: list[Scored]
    histories: dict[tuple[Protocol, str], list[list[dict[str, float]]]]
    embeddings: FloatArray
    centroids: FloatArray
    cluster_ids: npt.NDArray[np.int64]
    train_positions: int


@dataclass(frozen=True)
class _Side:
    """What one protocol makes of the texts: hidden states of three parts, and the clusters."""

    protocol: Protocol
    ids: list[list[int]]  # of the scored texts
    train: HiddenStates
    stopping: HiddenStates
    scored: HiddenStates
    centroids: Tensor


def run_experiment(
    trunk: Trunk,
    base_model: str,
    train_texts: list[str],
    scored_texts: list[str],
    settings: Experiment,
    num_seeds: int,
    work: Path,
    report: Progress,
) -> Outcome:
    """Do, or finish, the whole experiment in `work`. A tenth of the training texts decides when to stop.

    Raises InputError when `work` holds an experiment on other texts, base or settings, or when there are too few texts
    or clusters; OutputError when another process is at work there.
    """
    if settings.num_clusters < 2:
        raise InputError("a comparison needs at least 2 clusters: with one there is nothing to adapt to")
    if settings.max_length > trunk.max_positions:
        raise InputError(f"max_length {settings.max_length} exceeds the model's {trunk.max_positions} positions")
    made_of = _fingerprint(trunk, train_texts, scored_texts, settings)
    with _work_directory(work, made_of):
        parts = dict(zip(("train", "stopping"), split_texts(train_texts, STOPPING, "stopping"), strict=True))
        if not parts["train"] or not parts["stopping"]:
            raise InputError(f"{len(train_texts)} training texts are too few to hold some out: pass more")
        parts["scored"] = scored_texts
        sides = {protocol: _side(trunk, protocol, parts, settings, work, report) for protocol in PROTOCOLS}
        _write_whole(work / "settings.json", made_of)  # from here on there is something worth resuming
        scored = [_score_base(trunk, side) for side in sides.values()]
        histories: dict[tuple[Protocol, str], list[list[dict[str, float]]]] = {}
        runs: dict[tuple[Protocol, str], list[dict[str, FloatArray]]] = {}
        jobs = [
            (p, v, seed) for seed in range(settings.seed, settings.seed + num_seeds) for p in sides for v in VARIANTS
        ]
        for done, (protocol, variant, seed) in enumerate(jobs):
            report("trainings", done, len(jobs))
            path = work / protocol / f"seed-{seed}" / variant.name
            scores = _train_and_score(trunk, base_model, variant, sides, protocol, settings, seed, path, report)
            runs.setdefault((protocol, variant.name), []).append(scores)
            history = json.loads((path / "training.json").read_text())["history"]
            histories.setdefault((protocol, variant.name), []).append(history)
        report("trainings", len(jobs), len(jobs))
        for protocol in sides:
            for variant in VARIANTS:
                scored += _collect(trunk, variant, sides, protocol, settings, runs[protocol, variant.name])
    masked = sides["masked"]
    return Outcome(
        scored, histories, masked.scored.embeddings.double().numpy(), masked.centroids.double().numpy(),
        nearest_centroids(masked.scored.embeddings, masked.centroids).numpy(), len(masked.train.targets),
    )  # fmt: skip


def _side(
    trunk: Trunk, protocol: Protocol, parts: dict[str, list[str]], settings: Experiment, work: Path, report: Progress
) -> _Side:
    states, ids = {}, []
    for part, texts in parts.items():
        ids = encode_texts(texts, trunk.tokenizer, protocol, settings.max_length)
        what, total = f"hidden states ({protocol}, {part})", len(ids)
        states[part] = cache_hidden_states(
            trunk, ids, protocol, settings.max_length, work / "hidden_states" / protocol / part,
            lambda done, what=what, total=total: report(what, done, total),  # type: ignore[misc]
        )  # fmt: skip
    centroids = fit_centroids(states["train"].embeddings, settings.num_clusters, settings.seed)
    return _Side(protocol, ids, states["train"], states["stopping"], states["scored"], centroids)


def _train_and_score(
    trunk: Trunk,
    base_model: str,
    variant: Variant,
    sides: dict[Protocol, _Side],
    protocol: Protocol,
    settings: Experiment,
    seed: int,
    path: Path,
    report: Progress,
) -> dict[str, FloatArray]:
    """Scores [texts] by "protocol.conditioning" of one checkpoint, trained if it is not there."""
    side, scores = sides[protocol], path.with_name(f"{path.name}.safetensors")
    if not path.exists():
        base = os.path.relpath(base_model, path) if Path(base_model).exists() else base_model
        config = checkpoint_config(variant, settings, trunk, base, protocol)
        training = replace(
            RECIPES[settings.recipe].settings,
            epochs=settings.epochs, batch_size=settings.batch_size, lr=settings.lr, patience=settings.patience,
            seed=seed,
        )  # fmt: skip
        vector = side.train.embeddings.mean(0) if variant.constant else None
        train_on_states(trunk, config, side.train, side.stopping, side.centroids, path, training, report, vector)
    if not scores.exists():
        checkpoint = load_checkpoint(path, trunk=trunk)
        found: dict[str, FloatArray] = {}
        for other in sides.values():
            # A text is embedded as in training, whichever protocol scores it.
            embedded = replace(other.scored, embeddings=_embed(trunk, other.ids, protocol, settings))
            ways = conditionings(variant, checkpoint, embedded.embeddings, side.centroids, settings.seed)
            for name, conditioned in ways:
                if other is side or name == usual(variant):
                    report(f"scoring ({variant.name})", len(found), 9)
                    found[f"{other.protocol}.{name}"] = score_texts(
                        checkpoint.factors, settings.alpha, trunk.head_weight, embedded, conditioned
                    )
        partial = scores.with_suffix(".partial")
        save_file(found, partial)
        os.replace(partial, scores)
    return load_file(scores)


def _embed(trunk: Trunk, ids: list[list[int]], protocol: Protocol, settings: Experiment) -> Tensor:
    return embed_texts(ids, trunk.token_embedding, protocol, settings.max_length, trunk.eos_token_id)


def _score_base(trunk: Trunk, side: _Side) -> Scored:
    nothing = conditioning.constant(side.centroids[0], len(side.scored))
    nll = score_texts(None, 0.0, trunk.head_weight, side.scored, nothing)[None]
    clusters = nearest_centroids(side.scored.embeddings, side.centroids).numpy()
    positions = np.diff(side.scored.offsets)
    return Scored("base", side.protocol, side.protocol, "none", trunk.num_parameters(), nll, positions, clusters)


def _collect(
    trunk: Trunk,
    variant: Variant,
    sides: dict[Protocol, _Side],
    protocol: Protocol,
    settings: Experiment,
    runs: list[dict[str, FloatArray]],
) -> Iterator[Scored]:
    for key in runs[0]:
        scored, _, name = key.partition(".")
        other = next(side for side in sides.values() if side.protocol == scored)
        clusters = nearest_centroids(_embed(trunk, other.ids, protocol, settings), sides[protocol].centroids)
        yield Scored(
            variant.name, protocol, other.protocol, name, num_parameters(trunk, settings, variant),
            np.stack([run[key] for run in runs]), np.diff(other.scored.offsets), clusters.numpy(),
        )  # fmt: skip


@contextmanager
def _work_directory(work: Path, made_of: str) -> Iterator[None]:
    """One process at a time works there, and on one experiment only."""
    with locked_directory(
        work.resolve(), f"another process is at work in {work}: wait for it or choose another --work"
    ):
        settings = work / "settings.json"
        if settings.exists() and settings.read_text() != made_of:
            raise InputError(f"{work} holds an experiment on other texts, base or settings: choose another --work")
        yield


def _write_whole(file: Path, text: str) -> None:
    partial = file.with_suffix(".partial")
    partial.write_text(text)
    os.replace(partial, file)


def _fingerprint(trunk: Trunk, train_texts: list[str], scored_texts: list[str], settings: Experiment) -> str:
    """All that the results depend on but the number of seeds, which may grow."""
    texts = hashlib.sha256(json.dumps([train_texts, scored_texts]).encode()).hexdigest()
    base = hashlib.sha256(trunk.token_embedding.numpy().tobytes() + trunk.head_weight.numpy().tobytes()).hexdigest()
    return json.dumps({"settings": msgspec.to_builtins(settings), "texts": texts, "base": base}, indent=2) + "\n"
