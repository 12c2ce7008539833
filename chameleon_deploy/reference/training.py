"""A whole training: from texts to a checkpoint directory."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import msgspec
import torch
from torch import nn

from chameleon_deploy.contract.bundle import FloatArray
from chameleon_deploy.directory import write_whole
from chameleon_deploy.errors import ChameleonError, InputError, OutputExistsError
from chameleon_deploy.reference.checkpoint import Checkpoint, CheckpointConfig, build_factors, save_checkpoint
from chameleon_deploy.reference.clustering import fit_centroids
from chameleon_deploy.reference.corpus import encode_pieces
from chameleon_deploy.reference.fit import TrainingData, TrainingState, fit
from chameleon_deploy.reference.head_losses import HeadLosses
from chameleon_deploy.reference.hypernetwork import Hypernetwork, StaticLoRA
from chameleon_deploy.reference.losses import Losses, Objective, losses_of
from chameleon_deploy.reference.model import Trunk
from chameleon_deploy.reference.presets import TrainingSettings
from chameleon_deploy.reference.residual import add_residual
from chameleon_deploy.reference.targets import in_head_alone, target_specs
from chameleon_deploy.terminal.progress import Progress


@dataclass(frozen=True)
class TrainingInputs:
    """Texts to train on and to validate with, and what is known beside them.

    vectors  float32 [texts, conditioning_size] of the training and of the validation texts, for a configuration with a
             conditioning_size; texts of equal vectors share their batches
    lora     a trained LoRA, which a hypernetwork begins with, see `fit_checkpoint`
    """

    train: list[str]
    validation: list[str]
    vectors: tuple[FloatArray, FloatArray] | None = None
    lora: Checkpoint | None = None


def train_checkpoint(
    trunk: Trunk,
    config: CheckpointConfig,
    inputs: TrainingInputs,
    out: Path,
    settings: TrainingSettings,
    report: Progress,
    resume: bool = False,
) -> TrainingState:
    """Train one regime and write the checkpoint directory `out`, which appears when it is complete.

    Working files (hidden states, the state of the last epoch) are in `<out>.training` until then.

    resume  continue an interrupted training of the same `out`

    Raises OutputExistsError, InputError.
    """
    vectors, lora = inputs.vectors, inputs.lora
    work = out.with_name(out.name + ".training")
    if out.exists():
        raise OutputExistsError(f"{out} exists: choose another --out or delete it")
    interrupted = work / "settings.json"
    if interrupted.exists() and not resume:
        raise OutputExistsError(f"{work} holds an interrupted training: pass --resume to continue it, or delete it")
    if config.max_length > trunk.max_positions:
        raise InputError(f"max_length {config.max_length} exceeds the model's {trunk.max_positions} positions")
    check_settings(config, settings, lora)
    if lora and lora.trunk is not trunk and lora.trunk.digest() != trunk.digest():
        raise InputError("the LoRA to begin with was trained on another base model: pass that one as --base")
    sizes = {part.shape[1] for part in vectors} if vectors else {0}
    if sizes != {config.conditioning_size}:
        raise InputError(f"the texts have vectors of {sorted(sizes)} numbers, not of {config.conditioning_size}")
    made_of = _fingerprint(config, settings, inputs)
    if interrupted.exists() and interrupted.read_text() != made_of:
        raise InputError(f"{work} was started with other texts or settings: repeat them to resume, or delete it")
    work.mkdir(parents=True, exist_ok=True)

    def losses(part: str, texts: list[str], given: FloatArray | None) -> Losses:
        pieces = encode_pieces(texts, trunk.tokenizer, config.protocol, config.max_length)
        return losses_of(
            trunk, [ids for _, ids in pieces],
            Objective(config.targets, config.alpha, config.protocol, config.max_length),
            work / part, lambda done: report(f"hidden states ({part})", done, len(pieces)),
            None if given is None else torch.from_numpy(given[[text for text, _ in pieces]]),
        )  # fmt: skip

    try:
        given = vectors or (None, None)
        train = losses("train", inputs.train, given[0])
        validation = losses("validation", inputs.validation, given[1])
        if vectors:
            centroids = torch.unique(train.embeddings, dim=0)
        else:
            centroids = fit_centroids(train.embeddings, config.num_clusters, settings.seed)
    except ChameleonError:
        shutil.rmtree(work)
        raise
    # From here on there is progress worth resuming.
    write_whole(interrupted, lambda partial: partial.write_text(made_of))
    return fit_checkpoint(trunk, config, TrainingData(train, validation, centroids), out, settings, report, lora)


def fit_checkpoint(
    trunk: Trunk,
    config: CheckpointConfig,
    data: TrainingData,
    out: Path,
    settings: TrainingSettings,
    report: Progress,
    lora: Checkpoint | None = None,
) -> TrainingState:
    """Do the part of `train_checkpoint` after the texts are prepared; continue if `<out>.training` has a state.

    data  its centroids are the checkpoint's, which has none if it has a conditioning_size; a constant becomes its only
          centroid, so that mode `centroid` matches the training
    lora  a trained LoRA: the hypernetwork begins with its factors for every conditioning
    """
    centroids, constant = data.centroids, data.constant
    check_settings(config, settings, lora)
    work = out.with_name(out.name + ".training")
    work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(settings.seed)
    counted = _is_counted(config, settings)
    if counted and trunk.spec.logits_cap is not None:
        raise InputError("the preset residual counts what logits lack, and this base model caps them: choose another")
    factors = (
        StaticLoRA(target_specs(trunk, config.targets), config.rank - 1) if counted else build_factors(config, trunk)
    )
    for module in factors.modules():
        if isinstance(module, nn.Dropout):
            module.p = settings.dropout
    if lora or not (in_head_alone(config.targets) and config.architecture == "paper"):
        factors.begin_at_base(centroids)  # the paper's own training, of the head alone, begins with random factors
    if lora and isinstance(factors, Hypernetwork):
        factors.begin_with(lora.factors(centroids[:1]))
    state = fit(
        factors, data, settings, work,
        lambda state: report(f"epochs ({config.regime})", state.epoch, settings.epochs),
    )  # fmt: skip
    served = centroids[: 0 if config.conditioning_size else None] if constant is None else constant[None]
    record: dict[str, object] = {"settings": asdict(settings)}
    match counted, factors, data.train, data.validation:
        case True, StaticLoRA(), HeadLosses() as train, HeadLosses() as validation:
            factors, losses = add_residual(factors, train, validation, served, settings.batch_size)
            record["validation_loss_by_pseudo_count"] = {str(count): loss for count, loss in losses.items()}
            state.best_loss = min(losses.values())
    complete = work / "checkpoint"
    shutil.rmtree(complete, ignore_errors=True)
    complete.mkdir()
    save_checkpoint(complete, config, factors, served)
    (complete / "training.json").write_text(json.dumps(record | asdict(state), indent=2) + "\n")
    os.rename(complete, out)
    shutil.rmtree(work)
    return state


def check_settings(config: CheckpointConfig, settings: TrainingSettings, lora: Checkpoint | None = None) -> None:
    """Raise InputError for settings that the preset residual, or a start from a LoRA, cannot be trained with."""
    if lora:
        _check_lora(config, settings, lora)
    if not _is_counted(config, settings):
        return
    if config.rank < 2 or config.hidden_sizes != (config.num_clusters, config.num_clusters):
        raise InputError("the preset residual needs a rank of at least 2 and hidden sizes of one unit per cluster")
    if not in_head_alone(config.targets) or config.architecture != "paper" or config.conditioning_size:
        raise InputError(
            "the preset residual counts corrections of the head for each cluster: "
            "leave out --targets, --architecture and --conditioning"
        )


def check_start(config: CheckpointConfig, settings: TrainingSettings) -> None:
    """Raise InputError for a training that cannot begin with any LoRA."""
    if config.regime != "chameleon" or config.architecture != "paper" or settings.residual:
        raise InputError(
            "only a hypernetwork of architecture paper begins with a LoRA: "
            "leave out --from-lora, --regime lora, --architecture shared or --preset residual"
        )


def _check_lora(config: CheckpointConfig, settings: TrainingSettings, lora: Checkpoint) -> None:
    check_start(config, settings)
    if lora.config.regime != "lora":
        raise InputError("--from-lora names a checkpoint of regime chameleon: train one with --regime lora")
    for name in ("rank", "alpha", "targets"):
        own, other = getattr(config, name), getattr(lora.config, name)
        if own != other:
            raise InputError(f"the LoRA to begin with has {name} {other}, not {own} as this training")


def _is_counted(config: CheckpointConfig, settings: TrainingSettings) -> bool:
    """Return whether the hypernetwork is built from a trained LoRA and counts: reference/residual.py."""
    return settings.residual and config.regime == "chameleon"


def _fingerprint(config: CheckpointConfig, settings: TrainingSettings, inputs: TrainingInputs) -> str:
    """Return what must be equal for a training to continue. The number of epochs may change."""
    kept = {key: value for key, value in asdict(settings).items() if key not in ("epochs", "patience")}
    texts = hashlib.sha256(json.dumps([inputs.train, inputs.validation]).encode())
    for part in inputs.vectors or ():
        texts.update(part.tobytes())
    made_of = {"config": msgspec.to_builtins(config), "settings": kept, "texts": texts.hexdigest()}
    return json.dumps(made_of | ({"lora": inputs.lora.digest} if inputs.lora else {}))
