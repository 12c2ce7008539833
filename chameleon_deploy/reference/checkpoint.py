"""The checkpoint, which training writes and export reads (docs/design.md section 4).

Three kinds of input give the same `Checkpoint`: our own directory, a PEFT LoRA directory that targets lm_head, and a
state dict of the authors' script. Nothing is ever unpickled into objects.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from chameleon_deploy.contract.bundle import LM_HEAD, Protocol, TrainedRegime, factor_names
from chameleon_deploy.contract.peft_lora import CONFIG_FILE as PEFT_CONFIG_FILE
from chameleon_deploy.contract.peft_lora import PREFIX, is_of_the_head, read_config
from chameleon_deploy.contract.peft_lora import TENSOR_FILE as PEFT_TENSOR_FILE
from chameleon_deploy.directory import write_whole
from chameleon_deploy.errors import CheckpointError, TensorError, VersionError
from chameleon_deploy.reference.gguf import gguf_file
from chameleon_deploy.reference.hypernetwork import FactorModule, Hypernetwork, SharedHypernetwork, StaticLoRA
from chameleon_deploy.reference.model import Trunk, load_trunk
from chameleon_deploy.reference.presets import Architecture
from chameleon_deploy.reference.sentence_encoder import SentenceEncoder
from chameleon_deploy.reference.targets import target_specs

CONFIG_FILE = "chameleon_config.json"
TENSOR_FILE = "chameleon.safetensors"
FORMAT_VERSION = 1
AUTHORS_BASE = "gpt2"  # the hub id of the base model in the paper's scripts
MAX_SIZE = 1 << 20  # of any dimension in the configuration; products of larger ones overflow


class CheckpointConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The configuration of a checkpoint.

    architecture       of the hypernetwork: `Hypernetwork` or `SharedHypernetwork`
    conditioning_size  of a vector that the caller gives with every text; 0: texts are conditioned on embeddings
    """

    format: Literal["chameleon-checkpoint"] = "chameleon-checkpoint"
    format_version: int = FORMAT_VERSION
    regime: TrainedRegime
    base_model: str
    rank: int
    alpha: float = 1.0
    hidden_sizes: tuple[int, ...] = ()
    num_clusters: int
    protocol: Protocol = "masked"
    max_length: int = 256
    targets: tuple[str, ...] = (LM_HEAD,)
    architecture: Architecture = "paper"
    conditioning_size: int = 0


@dataclass
class Checkpoint:
    """A loaded checkpoint: the frozen trunk, the source of factors and the centroids [K, hidden] (K may be 0).

    encoder  makes the vectors that it is conditioned on, where a command names one
    """

    config: CheckpointConfig
    trunk: Trunk
    factors: FactorModule
    centroids: Tensor
    digest: str
    encoder: SentenceEncoder | None = None


def load_checkpoint(path: Path, base: str | None = None, trunk: Trunk | None = None) -> Checkpoint:
    """Load any of the three kinds of checkpoint.

    path   a checkpoint directory, a PEFT LoRA directory, or a state-dict file of the authors' script
    base   the base model, if the input does not name one or its path has moved
    trunk  the base model of one of our own checkpoints, if it is loaded already

    Raises CheckpointError, VersionError, TensorError or UnsupportedBaseError.
    """
    if not path.exists():
        raise CheckpointError(f"{path} does not exist: pass a directory that training wrote")
    if path.is_file():
        return _load_authors_state_dict(path, base or AUTHORS_BASE)
    if (path / CONFIG_FILE).is_file():
        return _load_own(path, base, trunk)
    if (path / PEFT_CONFIG_FILE).is_file():
        return _load_peft(path, base)
    raise CheckpointError(f"{path} has neither {CONFIG_FILE} nor {PEFT_CONFIG_FILE}: it is not a checkpoint")


def is_checkpoint(path: Path) -> bool:
    """Return whether `load_checkpoint` reads a path. A GGUF file and a model in Hugging Face format are base models."""
    if path.is_file():
        return gguf_file(path) is None
    return any((path / name).is_file() for name in (CONFIG_FILE, PEFT_CONFIG_FILE))


def save_checkpoint(path: Path, config: CheckpointConfig, factors: FactorModule, centroids: Tensor) -> None:
    """Write the two checkpoint files into an existing directory, each one whole or not at all."""
    tensors = {factors.stored_name(name): p.detach().contiguous() for name, p in factors.named_parameters()}
    if len(centroids):
        tensors["centroids"] = centroids.contiguous()
    encoded = msgspec.json.format(msgspec.json.encode(config), indent=2) + b"\n"
    write_whole(path / TENSOR_FILE, lambda partial: save_file(tensors, partial))
    write_whole(path / CONFIG_FILE, lambda partial: partial.write_bytes(encoded))


def build_factors(config: CheckpointConfig, trunk: Trunk) -> FactorModule:
    """Return a freshly initialised hypernetwork or LoRA. Raises CheckpointError for targets that the trunk lacks."""
    targets = target_specs(trunk, config.targets)
    if config.regime == "lora":
        return StaticLoRA(targets, config.rank)
    kind = SharedHypernetwork if config.architecture == "shared" else Hypernetwork
    return kind(config.conditioning_size or trunk.config.hidden_size, targets, config.rank, config.hidden_sizes)


def _load_own(path: Path, base: str | None, trunk: Trunk | None) -> Checkpoint:
    config = _read_config(path / CONFIG_FILE)
    tensors = read_tensors(path / TENSOR_FILE)
    trunk = trunk or load_trunk(base or resolve_base(path, config.base_model))
    centroids = tensors.pop("centroids", torch.empty(0, trunk.config.hidden_size))
    if tuple(centroids.shape) != (config.num_clusters, trunk.config.hidden_size):
        raise TensorError(
            f"{path / TENSOR_FILE}: centroids have shape {tuple(centroids.shape)}, "
            f"the configuration says {(config.num_clusters, trunk.config.hidden_size)}"
        )
    return _assemble(path, config, trunk, tensors, centroids, [path / CONFIG_FILE, path / TENSOR_FILE])


def _load_peft(path: Path, base: str | None) -> Checkpoint:
    config = read_config(path / PEFT_CONFIG_FILE)
    if not is_of_the_head(config):
        raise CheckpointError(
            f"{path}: only a LoRA whose single target is {LM_HEAD} is a checkpoint, found {config.target_modules}: "
            f"export its base model with --adapter NAME={path}"
        )
    base_model = base or config.base_model_name_or_path
    if not base_model:
        raise CheckpointError(f"{path / PEFT_CONFIG_FILE} names no base model: pass --base")
    tensors = read_tensors(path / PEFT_TENSOR_FILE)
    trunk = load_trunk(resolve_base(path, base_model))
    prefix = f"{PREFIX}{LM_HEAD}."
    head = tensors.pop(f"{prefix}base_layer.weight", trunk.head_weight)  # PEFT saves the head it wraps
    if not torch.equal(head, trunk.head_weight):
        raise TensorError(f"{path}: its {LM_HEAD} differs from the base model's: it was trained on another base model")
    named = {n.removeprefix(f"{prefix}lora_").removesuffix(".weight"): t for n, t in tensors.items()}
    if sorted(named) != ["A", "B"]:
        raise TensorError(f"{path}: expected {prefix}lora_{{A,B}}.weight only, found {sorted(tensors)}")
    # PEFT divides by the rank; the head here does not, so PEFT's factor is multiplied into alpha.
    own = CheckpointConfig(
        regime="lora", base_model=base_model, rank=config.rank(LM_HEAD), alpha=config.scaling(LM_HEAD), num_clusters=0,
        max_length=trunk.max_positions,
    )  # fmt: skip
    tensors = dict(zip(factor_names(LM_HEAD), (named["A"], named["B"]), strict=True))
    files = [path / PEFT_CONFIG_FILE, path / PEFT_TENSOR_FILE]
    return _assemble(path, own, trunk, tensors, torch.empty(0, trunk.config.hidden_size), files)


def _load_authors_state_dict(path: Path, base: str) -> Checkpoint:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(
            f"{path}: not a state dict that loads with weights_only=True: {type(error).__name__}"
        ) from error
    # The authors' Sequential counts its ReLU and Dropout modules, ours counts Linear modules.
    names = {"0": 0, "3": 1, "6": 2}
    prefix = "lm_head.hyper_net."
    tensors = {}
    for name, tensor in state.items() if isinstance(state, dict) else ():
        if str(name).startswith(prefix):
            index, _, kind = str(name).removeprefix(prefix).partition(".")
            if index not in names or kind not in ("weight", "bias"):
                raise TensorError(f"{path}: unexpected tensor {name}")
            tensors[f"hypernetwork.{names[index]}.{kind}"] = tensor
    if len(tensors) != 6:
        raise TensorError(f"{path}: expected the six tensors {prefix}{{0,3,6}}.{{weight,bias}}, found {len(tensors)}")
    trunk = load_trunk(base)
    vocab, hidden = trunk.head_weight.shape
    rank, remainder = divmod(len(tensors["hypernetwork.2.bias"]), hidden + vocab)
    if remainder:
        raise TensorError(f"{path}: the last layer does not fit a base model of hidden {hidden} and vocabulary {vocab}")
    config = CheckpointConfig(
        regime="chameleon",
        base_model=base,
        rank=rank,
        hidden_sizes=(len(tensors["hypernetwork.0.bias"]), len(tensors["hypernetwork.1.bias"])),
        num_clusters=0,
        protocol="paper",
        max_length=min(256, trunk.max_positions),
    )
    return _assemble(path, config, trunk, tensors, torch.empty(0, hidden), [path])


def _assemble(
    path: Path, config: CheckpointConfig, trunk: Trunk, tensors: dict[str, Tensor], centroids: Tensor, files: list[Path]
) -> Checkpoint:
    with torch.device("meta"):  # shapes only, which take no memory: the configuration may contain any size
        factors = build_factors(config, trunk)
    found = {}
    for name, parameter in factors.named_parameters():
        stored_name = factors.stored_name(name)
        stored = tensors.pop(stored_name, None)
        if stored is None:
            raise TensorError(f"{path}: tensor {stored_name} is missing")
        if stored.shape != parameter.shape:
            raise TensorError(
                f"{path}: {stored_name} has shape {tuple(stored.shape)}, "
                f"a rank-{config.rank} update of this base model needs {tuple(parameter.shape)}"
            )
        check_finite(path, stored_name, stored)
        found[name] = stored.to(torch.float32)
    if tensors:
        raise TensorError(f"{path}: unexpected tensors {sorted(tensors)}")
    factors.load_state_dict(found, assign=True)
    check_finite(path, "centroids", centroids)
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    factors.eval().requires_grad_(False)
    return Checkpoint(config, trunk, factors, centroids.to(torch.float32), digest.hexdigest())


def check_finite(path: Path, name: str, tensor: Tensor) -> None:
    """Raises TensorError for integers, NaN and infinity."""
    if not tensor.is_floating_point():
        raise TensorError(f"{path}: {name} has dtype {tensor.dtype}, expected floating point")
    if not torch.isfinite(tensor).all():
        raise TensorError(f"{path}: {name} holds NaN or infinity")


def _read_config(path: Path) -> CheckpointConfig:
    try:
        raw = msgspec.json.decode(path.read_bytes(), type=dict)
        if raw.get("format") == "chameleon-checkpoint" and raw.get("format_version") != FORMAT_VERSION:
            raise VersionError(
                f"{path}: format_version {raw.get('format_version')!r}, this release reads {FORMAT_VERSION}"
            )
        config = msgspec.convert(raw, CheckpointConfig)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    if config.rank < 1 or config.max_length < 1 or config.num_clusters < 0:
        raise CheckpointError(f"{path}: rank and max_length must be at least 1, num_clusters at least 0")
    if max(config.rank, config.max_length, config.num_clusters, *config.hidden_sizes, 0) > MAX_SIZE:
        raise CheckpointError(f"{path}: rank, max_length, num_clusters and hidden_sizes must be at most {MAX_SIZE}")
    if min(config.hidden_sizes, default=1) < 1:
        raise CheckpointError(f"{path}: hidden_sizes must be at least 1, not {list(config.hidden_sizes)}")
    if config.regime == "chameleon" and config.architecture == "shared" and not config.hidden_sizes:
        raise CheckpointError(f"{path}: the architecture shared needs at least one of hidden_sizes")
    if not 0 <= config.conditioning_size <= MAX_SIZE:
        raise CheckpointError(f"{path}: conditioning_size must be between 0 and {MAX_SIZE}")
    if config.conditioning_size and (config.num_clusters or config.regime == "lora"):
        raise CheckpointError(f"{path}: conditioning_size goes with regime chameleon and num_clusters 0")
    return config


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file. Raises CheckpointError."""
    if not path.is_file():
        raise CheckpointError(f"{path} is missing")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise CheckpointError(f"{path}: {error}") from error


def resolve_base(path: Path, base_model: str) -> str:
    """Return a path relative to the checkpoint if there is such a directory or GGUF file, else a hub id."""
    local = path / base_model
    if local.is_dir() or gguf_file(local):
        return str(local)
    if base_model.startswith((".", "/")):
        raise CheckpointError(f"{path}: its base model {base_model!r} is not there; pass --base")
    return base_model
