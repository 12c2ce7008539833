"""Fit a source of factors to texts: epochs of batches of one cluster, early stopping, progress that a kill keeps."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from chameleon_deploy.directory import write_whole
from chameleon_deploy.reference.clustering import nearest_centroids
from chameleon_deploy.reference.hypernetwork import FactorModule
from chameleon_deploy.reference.losses import Losses
from chameleon_deploy.reference.presets import TrainingSettings


@dataclass
class TrainingState:
    """The training state saved after every epoch, in addition to the parameters and the optimiser's moments."""

    epoch: int = 0
    best_epoch: int = 0
    best_loss: float = float("inf")
    history: list[dict[str, float]] = field(default_factory=list)


@dataclass(frozen=True)
class TrainingData:
    """Losses of texts, and how their batches are drawn and conditioned.

    centroids  [K, hidden], by which batches are drawn
    constant   [hidden], replaces the mean of every batch as conditioning: the control with the hypernetwork's capacity
               and nothing to adapt to
    """

    train: Losses
    validation: Losses
    centroids: Tensor
    constant: Tensor | None = None


def fit(
    factors: FactorModule,
    data: TrainingData,
    settings: TrainingSettings,
    state_dir: Path,
    on_epoch: Callable[[TrainingState], None] = lambda state: None,
) -> TrainingState:
    """Train `factors` in place and leave the parameters of the best epoch in it.

    Progress is saved in state_dir after every epoch. A second call with the same state_dir continues the training and
    ends with the same parameters as an uninterrupted run.
    """
    train, constant = data.train, data.constant
    optimizer = torch.optim.AdamW(factors.parameters(), lr=settings.lr)
    state = _restore(factors, optimizer, state_dir) or TrainingState()
    train_clusters = _clusters(train, data.centroids)
    while state.epoch < settings.epochs and state.epoch - state.best_epoch < settings.patience:
        state.epoch += 1
        # All randomness of an epoch (order, dropout) follows from its number, so nothing else is saved.
        torch.manual_seed(settings.seed * 100_003 + state.epoch)
        factors.train()
        total, count = 0.0, 0
        batches = _shuffled_batches(train_clusters, settings.batch_size)
        for start in range(0, len(batches), settings.cohorts_per_step):
            step = batches[start : start + settings.cohorts_per_step]
            positions = sum(train.num_positions(rows) for rows in step)
            optimizer.zero_grad()
            for rows in step:
                conditioning = train.embeddings[rows].mean(0) if constant is None else constant
                total += train.backward(factors, conditioning, rows, positions)
            count += positions
            optimizer.step()
        loss = validation_loss(factors, data.validation, data.centroids, settings.batch_size, constant)
        state.history.append({"epoch": state.epoch, "train_loss": total / count, "validation_loss": loss})
        if loss < state.best_loss:
            state.best_loss, state.best_epoch = loss, state.epoch
            _save_tensors(dict(factors.state_dict()), state_dir / "best.safetensors")
        _save(factors, optimizer, state, state_dir)
        on_epoch(state)
    factors.load_state_dict(load_file(state_dir / "best.safetensors"))
    factors.eval().requires_grad_(False)
    return state


def validation_loss(
    factors: FactorModule | None,
    losses: Losses,
    centroids: Tensor,
    batch_size: int,
    constant: Tensor | None = None,
) -> float:
    """Return the mean cross-entropy over all positions, with cohorts drawn per cluster as in training. factors None:
    the base model.
    """
    total = 0.0
    if factors is not None:
        factors.eval()
    for rows in cohorts(_clusters(losses, centroids), batch_size):
        conditioning = losses.embeddings[rows].mean(0) if constant is None else constant
        total += float(losses.cross_entropy(factors, conditioning, rows).sum())
    return total / losses.num_positions(range(len(losses)))


def _clusters(losses: Losses, centroids: Tensor) -> list[Tensor]:
    assigned = nearest_centroids(losses.embeddings, centroids)
    return [torch.nonzero(assigned == k).flatten() for k in range(len(centroids))]


def cohorts(clusters: list[Tensor], batch_size: int) -> Iterator[list[int]]:
    """Yield rows of one cluster at a time, in order, at most batch_size together."""
    for rows in clusters:
        for chunk in rows.split(batch_size):
            if len(chunk):
                yield chunk.tolist()


def _shuffled_batches(clusters: list[Tensor], batch_size: int) -> list[list[int]]:
    batches = list(cohorts([rows[torch.randperm(len(rows))] for rows in clusters], batch_size))
    return [batches[i] for i in torch.randperm(len(batches)).tolist()]


def _save(factors: nn.Module, optimizer: torch.optim.Optimizer, state: TrainingState, state_dir: Path) -> None:
    tensors = {f"parameter.{name}": t for name, t in factors.state_dict().items()}
    for (name, _), moments in zip(factors.named_parameters(), optimizer.state_dict()["state"].values(), strict=True):
        tensors |= {f"{key}.{name}": value for key, value in moments.items()}
    # A single file holds everything, so that a kill between two files cannot mix two epochs.
    tensors["json"] = torch.from_numpy(np.frombuffer(json.dumps(asdict(state)).encode(), dtype=np.uint8).copy())
    _save_tensors(tensors, state_dir / "state.safetensors")


def _restore(factors: nn.Module, optimizer: torch.optim.Optimizer, state_dir: Path) -> TrainingState | None:
    file = state_dir / "state.safetensors"
    if not file.is_file():
        return None
    tensors = load_file(file)
    factors.load_state_dict({n.removeprefix("parameter."): t for n, t in tensors.items() if n.startswith("parameter.")})
    saved = optimizer.state_dict()
    for index, (name, _) in enumerate(factors.named_parameters()):
        saved["state"][index] = {key: tensors[f"{key}.{name}"] for key in ("step", "exp_avg", "exp_avg_sq")}
    optimizer.load_state_dict(saved)
    return TrainingState(**json.loads(tensors["json"].numpy().tobytes()))


def _save_tensors(tensors: dict[str, Tensor], file: Path) -> None:
    contiguous = {name: t.contiguous() for name, t in tensors.items()}
    write_whole(file, lambda partial: save_file(contiguous, partial))
