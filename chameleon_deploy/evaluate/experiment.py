"""The whole comparison: train every variant with several seeds under each protocol, score held-out texts in every way.

Finished parts stay in the work directory, so that a run that was killed continues:

    settings.json                       what identifies the experiment
    hidden_states/{protocol}/{part}/    the trunk's output, computed once for all variants and seeds
    {protocol}/seed-{n}/{variant}/      a checkpoint; {variant}.lr-{rate}/ until the best learning rate is known
    {protocol}/seed-{n}/{variant}.safetensors    its scores: one tensor [texts] per protocol and conditioning
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import msgspec
import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file, save_file
from torch import Tensor

from chameleon_deploy.contract.bundle import Protocol
from chameleon_deploy.directory import locked_directory, write_whole
from chameleon_deploy.errors import InputError
from chameleon_deploy.evaluate import conditioning
from chameleon_deploy.evaluate.scoring import FloatArray, positions_of, score_texts
from chameleon_deploy.evaluate.variants import (
    VARIANTS,
    ConditioningName,
    Variant,
    checkpoint_config,
    conditionings,
    num_parameters,
    usual,
)
from chameleon_deploy.reference.checkpoint import load_checkpoint
from chameleon_deploy.reference.clustering import embed_texts, fit_centroids, nearest_centroids
from chameleon_deploy.reference.corpus import Split, encode_texts
from chameleon_deploy.reference.fit import TrainingData
from chameleon_deploy.reference.losses import Losses, Objective, losses_of
from chameleon_deploy.reference.model import Trunk
from chameleon_deploy.reference.presets import Preset
from chameleon_deploy.reference.training import check_settings, check_start, fit_checkpoint
from chameleon_deploy.terminal.progress import Progress

PROTOCOLS: tuple[Protocol, ...] = ("paper", "masked")


@dataclass(frozen=True)
class Scored:
    """One variant, trained under one protocol, scored under one with one conditioning.

    variant      "base" or a Variant's name; the base is trained under no protocol and has one "seed"
    nll          float64 [seeds, texts], in nats
    positions    int64 [texts]
    cluster_ids  int64 [texts], by the centroids of the training protocol
    """

    variant: str
    trained: Protocol
    scored: Protocol
    conditioning: ConditioningName
    parameters: int
    nll: FloatArray
    positions: npt.NDArray[np.int64]
    cluster_ids: npt.NDArray[np.int64]


@dataclass(frozen=True)
class Outcome:
    """The results of an experiment.

    protocols        of training and scoring
    scored           every variant, protocol and conditioning
    histories        [protocol, variant]: one list of epochs per seed
    embeddings       [texts, hidden] of the last protocol, for the map
    centroids        [K, hidden] of the last protocol, for the map
    cluster_ids      int64 [texts] of the last protocol, for the map
    train_positions  scored positions of the training texts under the last protocol
    """

    protocols: tuple[Protocol, ...]
    scored: list[Scored]
    histories: dict[tuple[Protocol, str], list[list[dict[str, float]]]]
    embeddings: FloatArray
    centroids: FloatArray
    cluster_ids: npt.NDArray[np.int64]
    train_positions: int


@dataclass(frozen=True)
class _Side:
    """The texts under one protocol: losses of the three splits, and clusters of the training texts.

    test_ids  token ids of the test texts
    """

    protocol: Protocol
    train: Losses
    validation: Losses
    test: Losses
    test_ids: list[list[int]]
    centroids: Tensor


@dataclass(frozen=True)
class Design:
    """What is trained.

    settings   its seed is that of the first training; later ones count up
    protocols  of training and scoring, each beside the others
    """

    settings: Preset
    num_seeds: int
    protocols: tuple[Protocol, ...] = PROTOCOLS


@dataclass(frozen=True)
class _Job:
    """One training. path: of its checkpoint, in the work directory."""

    protocol: Protocol
    variant: Variant
    seed: int

    @property
    def path(self) -> Path:
        return Path(self.protocol, f"seed-{self.seed}", self.variant.name)


def run_experiment(
    trunk: Trunk, base_model: str, texts: Split, design: Design, work: Path, report: Progress
) -> Outcome:
    """Run or finish the whole experiment in `work`.

    Raises InputError if `work` holds an experiment on other texts, base, protocols or settings, or if there are too
    few texts or clusters; OutputError if another process works there.
    """
    settings, protocols = design.settings, design.protocols
    if settings.num_clusters < 2:
        raise InputError("a comparison needs at least 2 clusters: with one there is nothing to adapt to")
    if settings.max_length > trunk.max_positions:
        raise InputError(f"max_length {settings.max_length} exceeds the model's {trunk.max_positions} positions")
    if not all(texts):
        raise InputError("the training, validation and test texts are too few: one of the three has none")
    for variant in VARIANTS:  # before the first training, which may take hours
        config = checkpoint_config(variant, settings, trunk, base_model, protocols[0])
        check_settings(config, settings.training)
        if settings.from_lora and variant.regime == "chameleon":
            check_start(config, settings.training)
    made_of = _fingerprint(trunk, texts, settings, protocols)
    with _work_directory(work, made_of):
        sides = {protocol: _side(trunk, protocol, texts, settings, work, report) for protocol in protocols}
        # From here on there is progress worth resuming.
        write_whole(work / "settings.json", lambda partial: partial.write_text(made_of))
        scored = [_score_base(trunk, side) for side in sides.values()]
        histories: dict[tuple[Protocol, str], list[list[dict[str, float]]]] = {}
        runs: dict[tuple[Protocol, str], list[dict[str, FloatArray]]] = {}
        first = settings.training.seed
        seeds = range(first, first + design.num_seeds)
        jobs = [_Job(protocol, variant, seed) for seed in seeds for protocol in sides for variant in VARIANTS]
        for done, job in enumerate(jobs):
            report("trainings", done, len(jobs))
            scores = _train_and_score(trunk, base_model, job, sides, settings, work, report)
            runs.setdefault((job.protocol, job.variant.name), []).append(scores)
            history = json.loads((work / job.path / "training.json").read_text())["history"]
            histories.setdefault((job.protocol, job.variant.name), []).append(history)
        report("trainings", len(jobs), len(jobs))
        for protocol in sides:
            for variant in VARIANTS:
                scored += _collect(trunk, variant, sides, protocol, settings, runs[protocol, variant.name])
    last = sides[protocols[-1]]
    return Outcome(
        protocols, scored, histories, last.test.embeddings.double().numpy(), last.centroids.double().numpy(),
        nearest_centroids(last.test.embeddings, last.centroids).numpy(),
        last.train.num_positions(range(len(last.train))),
    )  # fmt: skip


def _side(trunk: Trunk, protocol: Protocol, texts: Split, settings: Preset, work: Path, report: Progress) -> _Side:
    def encode(part: list[str]) -> list[list[int]]:
        return encode_texts(part, trunk.tokenizer, protocol, settings.max_length)

    def losses(name: str, ids: list[list[int]]) -> Losses:
        return losses_of(
            trunk, ids, Objective(settings.targets, settings.alpha, protocol, settings.max_length),
            work / "hidden_states" / protocol / name,
            lambda done: report(f"hidden states ({protocol}, {name})", done, len(ids)),
        )  # fmt: skip

    train, validation = losses("train", encode(texts.train)), losses("validation", encode(texts.validation))
    test_ids = encode(texts.test)
    test = losses("test", test_ids)
    centroids = fit_centroids(train.embeddings, settings.num_clusters, settings.training.seed)
    return _Side(protocol, train, validation, test, test_ids, centroids)


def _train_and_score(
    trunk: Trunk,
    base_model: str,
    job: _Job,
    sides: dict[Protocol, _Side],
    settings: Preset,
    work: Path,
    report: Progress,
) -> dict[str, FloatArray]:
    """Return scores [texts] by "protocol.conditioning" of one checkpoint, training it first if it does not exist."""
    protocol, variant, path, side = job.protocol, job.variant, work / job.path, sides[job.protocol]
    scores = path.with_name(f"{path.name}.safetensors")
    if not path.exists():
        base = os.path.relpath(base_model, path) if Path(base_model).exists() else base_model
        config = checkpoint_config(variant, settings, trunk, base, protocol)
        training = replace(settings.training, seed=job.seed)
        constant = side.train.embeddings.mean(0) if variant.constant else None
        data = TrainingData(side.train, side.validation, side.centroids, constant)
        rates = settings.lora_lrs if variant.regime == "lora" else ()
        begun = settings.from_lora and variant.regime == "chameleon"
        lora = load_checkpoint(path.with_name("lora"), trunk=trunk) if begun else None
        attempts = {path.with_name(f"{path.name}.lr-{lr:g}"): replace(training, lr=lr) for lr in rates}
        for out, own in (attempts or {path: training}).items():
            if not out.exists():
                fit_checkpoint(trunk, config, data, out, own, report, lora)
        if attempts:
            os.rename(min(attempts, key=_validation_loss), path)
        for out in attempts:
            shutil.rmtree(out, ignore_errors=True)
    if not scores.exists():
        checkpoint = load_checkpoint(path, trunk=trunk)
        jobs = [
            (other, name, conditioned)
            for other in sides.values()
            # A text is embedded as in training, whichever protocol scores it.
            for name, conditioned in conditionings(
                variant, checkpoint, _embed(trunk, other.test_ids, protocol, settings), side.centroids,
                settings.training.seed,
            )
            if other is side or name == usual(variant)
        ]  # fmt: skip
        found: dict[str, FloatArray] = {}
        for done, (other, name, conditioned) in enumerate(jobs):
            report(f"scoring ({variant.name})", done, len(jobs))
            found[f"{other.protocol}.{name}"] = score_texts(checkpoint.factors, other.test, conditioned)
        write_whole(scores, lambda partial: save_file(found, partial))
    return load_file(scores)


def _validation_loss(path: Path) -> float:
    return float(json.loads((path / "training.json").read_text())["best_loss"])


def _embed(trunk: Trunk, ids: list[list[int]], protocol: Protocol, settings: Preset) -> Tensor:
    return embed_texts(ids, trunk.token_embedding, protocol, settings.max_length, trunk.eos_token_id)


def _score_base(trunk: Trunk, side: _Side) -> Scored:
    nothing = conditioning.constant(side.centroids[0], len(side.test))
    nll = score_texts(factors=None, losses=side.test, conditioning=nothing)[None]
    clusters = nearest_centroids(side.test.embeddings, side.centroids).numpy()
    positions = positions_of(side.test)
    return Scored("base", side.protocol, side.protocol, "none", trunk.num_parameters(), nll, positions, clusters)


def _collect(
    trunk: Trunk,
    variant: Variant,
    sides: dict[Protocol, _Side],
    protocol: Protocol,
    settings: Preset,
    runs: list[dict[str, FloatArray]],
) -> Iterator[Scored]:
    for key in runs[0]:
        scored, _, name = key.partition(".")
        other = next(side for side in sides.values() if side.protocol == scored)
        clusters = nearest_centroids(_embed(trunk, other.test_ids, protocol, settings), sides[protocol].centroids)
        yield Scored(
            variant.name, protocol, other.protocol, cast(ConditioningName, name),
            num_parameters(trunk, settings, variant), np.stack([run[key] for run in runs]),
            positions_of(other.test), clusters.numpy(),
        )  # fmt: skip


@contextmanager
def _work_directory(work: Path, made_of: str) -> Iterator[None]:
    """Lock the work directory for one process and one experiment."""
    with locked_directory(work.resolve(), f"another process works in {work}: wait for it or choose another --work"):
        settings = work / "settings.json"
        if settings.exists() and settings.read_text() != made_of:
            raise InputError(
                f"{work} holds an experiment on other texts, base, protocols or settings: choose another --work"
            )
        yield


def _fingerprint(trunk: Trunk, texts: Split, settings: Preset, protocols: tuple[Protocol, ...]) -> str:
    """Return everything that the results depend on except the number of seeds, which may grow."""
    digest = hashlib.sha256(json.dumps(texts).encode()).hexdigest()
    base = hashlib.sha256(trunk.token_embedding.numpy().tobytes() + trunk.head_weight.numpy().tobytes()).hexdigest()
    made_of = {"settings": msgspec.to_builtins(settings), "protocols": protocols, "texts": digest, "base": base}
    return json.dumps(made_of, indent=2) + "\n"
