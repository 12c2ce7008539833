"""Read a PEFT LoRA directory: a low-rank update of any linear layers.

Only plain low-rank updates are read: y + scaling * (x A^T) B^T. Everything else that PEFT can put into a directory is
refused by the name of its option or tensor, as is an option that this release does not know.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import regex
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from chameleon_deploy.contract.bundle import LM_HEAD, FloatArray, factor_names
from chameleon_deploy.errors import CheckpointError, TensorError

CONFIG_FILE, TENSOR_FILE = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
MAX_RANK = 1024  # every layer is padded to the largest rank of its adapter
MAX_CONFIG_BYTES = 2**20
MATCH_SECONDS = 1  # of one pattern and one layer
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

# Options that do not change what a saved adapter computes.
_WITHOUT_EFFECT = {
    "auto_mapping", "base_model_name_or_path", "revision", "peft_version", "task_type", "inference_mode",
    "lora_dropout", "fan_in_fan_out", "eva_config", "megatron_core", "runtime_config", "qalora_group_size",
    "ensure_weight_tying",
}  # fmt: skip
# Initialisations after which the base model is unchanged; PiSSA, OLoRA and others subtract the first factors from it.
_INITIALISATIONS = (None, True, False, "gaussian", "eva", "orthogonal")


class PeftConfig(msgspec.Struct, frozen=True):
    """The options of adapter_config.json that say which layers are adapted, and how."""

    r: int
    lora_alpha: float
    target_modules: list[str] | str
    peft_type: str = "LORA"
    use_rslora: bool = False
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, float] | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    bias: str = "none"
    init_lora_weights: bool | str | None = None

    def rank(self, layer: str) -> int:
        return int(_of_pattern(self.rank_pattern or {}, layer, self.r))

    def scaling(self, layer: str) -> float:
        rank, alpha = self.rank(layer), _of_pattern(self.alpha_pattern or {}, layer, self.lora_alpha)
        return float(alpha / (math.sqrt(rank) if self.use_rslora else rank))

    def adapts(self, layer: str) -> bool:
        """Return whether PEFT adapts a linear layer of that name."""
        if self.exclude_modules and _matches(self.exclude_modules, layer):
            return False
        if self.target_modules == "all-linear":
            return layer != LM_HEAD
        return _matches(self.target_modules, layer) and (
            isinstance(self.target_modules, str) or self._is_transformed(layer)
        )

    def _is_transformed(self, layer: str) -> bool:
        """Return whether `layers_to_transform` has the number in a layer's name, or there is no such option."""
        if self.layers_to_transform is None or self.layers_to_transform == []:
            return True
        patterns = [self.layers_pattern] if isinstance(self.layers_pattern, str) else self.layers_pattern
        found = (_match(rf"(?:^|.*?\.){pattern}\.(\d+)\..*", layer) for pattern in patterns or ["[^.]*"])
        number = next((int(match[1]) for match in found if match), None)
        wanted = self.layers_to_transform
        return number in ([wanted] if isinstance(wanted, int) else wanted)


def read_peft(path: Path, layers: Mapping[str, tuple[int, int]], head_weight: Any = None) -> dict[str, FloatArray]:
    """Return the factors of an adapter: "<layer>.lora_A" float32 [rank, in] and "<layer>.lora_B" [rank, out].

    The scaling is multiplied into B, and layers of a smaller rank than the largest are padded with zeros.

    layers       in_features and out_features of every layer that may be adapted, by name
    head_weight  [vocab, hidden]; PEFT stores a copy of a head that it adapts, which must be equal

    Raises CheckpointError for a configuration that is not a plain LoRA, TensorError for tensors that do not fit it.
    """
    config = read_config(path / CONFIG_FILE)
    try:
        wanted = {name for name in layers if config.adapts(name)}
        ranks = {name: config.rank(name) for name in wanted}
        scalings = {name: config.scaling(name) for name in wanted}
    except TimeoutError as error:
        raise CheckpointError(f"{path / CONFIG_FILE}: a pattern takes over {MATCH_SECONDS} s to match") from error
    except (regex.error, ZeroDivisionError, OverflowError) as error:
        raise CheckpointError(f"{path / CONFIG_FILE}: {error}") from error
    pairs = _pairs(path, _tensors(path), head_weight)
    if unknown := sorted(pairs.keys() - layers.keys()):
        raise TensorError(f"{path}: adapts {unknown[0]!r}, which is not among the linear layers that can be adapted")
    if not wanted or pairs.keys() != wanted:
        differing = sorted(pairs.keys() ^ wanted)
        raise TensorError(f"{path}: its tensors and target_modules differ at {differing or 'every layer'}")
    factors = {}
    largest = max(ranks.values())
    for layer in (name for name in layers if name in pairs):  # in the order of the model
        for name, matrix, width in zip(factor_names(layer), pairs[layer], layers[layer], strict=True):
            if tuple(matrix.shape) != (ranks[layer], width):
                raise TensorError(f"{path}: {name} has shape {tuple(matrix.shape)}, not {(ranks[layer], width)}")
            if matrix.dtype not in _DTYPES:
                raise TensorError(f"{path}: {name} is {matrix.dtype}: save it as {', '.join(map(str, _DTYPES))}")
            scaling = scalings[layer] if name == factor_names(layer)[1] else 1.0
            factors[name] = np.zeros((largest, width), np.float32)
            with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is refused
                factors[name][: ranks[layer]] = matrix.float().numpy() * np.float32(scaling)
            if not np.isfinite(factors[name]).all():
                raise TensorError(f"{path}: {name}, scaled by {scaling:g}, holds NaN, infinity or beyond float32")
    return factors


def read_config(file: Path) -> PeftConfig:
    """Read adapter_config.json. Raises CheckpointError, also for every option with an effect that is not read here."""
    try:
        if not file.is_file():
            raise CheckpointError(f"{file} is missing, or no plain file")
        with file.open("rb") as opened:
            content = opened.read(MAX_CONFIG_BYTES + 1)
        if len(content) > MAX_CONFIG_BYTES:
            raise CheckpointError(f"{file}: over {MAX_CONFIG_BYTES} bytes are no PEFT LoRA configuration")
        raw = json.loads(content)
        config = msgspec.convert(raw, PeftConfig)
    except OSError as error:
        raise CheckpointError(f"{file}: {error.strerror}") from error
    except (ValueError, msgspec.ValidationError, RecursionError) as error:
        raise CheckpointError(f"{file}: not a PEFT LoRA configuration: {error}") from error
    refused = [
        name for name, value in raw.items() if value and name not in {*PeftConfig.__struct_fields__} | _WITHOUT_EFFECT
    ]
    if config.peft_type != "LORA":
        refused.append(f"peft_type={config.peft_type}")
    if config.bias != "none":
        refused.append(f"bias={config.bias}")
    if config.init_lora_weights not in _INITIALISATIONS:
        refused.append(f"init_lora_weights={config.init_lora_weights}")
    if refused:
        raise CheckpointError(f"{file}: {', '.join(refused)}: only a plain low-rank update can be deployed")
    ranks = [config.r, *(config.rank_pattern or {}).values()]
    if min(ranks) < 1 or max(ranks) > MAX_RANK:
        raise CheckpointError(f"{file}: ranks {min(ranks)} to {max(ranks)}: they must be from 1 to {MAX_RANK}")
    if not all(map(math.isfinite, [config.lora_alpha, *(config.alpha_pattern or {}).values()])):
        raise CheckpointError(f"{file}: lora_alpha is not finite")
    return config


def _tensors(path: Path) -> dict[str, Tensor]:
    file = path / TENSOR_FILE
    if not file.is_file():
        raise CheckpointError(f"{file} is missing: save the adapter with safe_serialization=True")
    try:
        return load_file(file)
    except SafetensorError as error:
        raise CheckpointError(f"{file}: {error}") from error


def _pairs(path: Path, tensors: dict[str, Tensor], head_weight: Any) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the A [rank, in] and B [rank, out] of every layer. Raises TensorError for any other tensor."""
    stored_head = tensors.pop(f"{PREFIX}{LM_HEAD}.base_layer.weight", None)
    if stored_head is not None and not _is_equal(stored_head, head_weight):
        raise TensorError(f"{path}: its {LM_HEAD} differs from the base model's")
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        match = re.fullmatch(rf"{re.escape(PREFIX)}(.+)\.lora_([AB])\.weight", name)
        if not match:
            raise TensorError(f"{path}: tensor {name!r}: only lora_A and lora_B of linear layers can be deployed")
        found.setdefault(match[1], {})[match[2]] = tensor
    for layer, pair in found.items():
        if len(pair) < 2 or any(matrix.ndim != 2 for matrix in pair.values()):
            raise TensorError(f"{path}: {layer} needs lora_A and lora_B, both matrices")
    return {layer: (pair["A"], pair["B"].T) for layer, pair in found.items()}


def _is_equal(stored: Tensor, head_weight: Any) -> bool:
    return head_weight is not None and bool(np.array_equal(stored.float().numpy(), np.asarray(head_weight)))


def _matches(modules: list[str] | str, layer: str) -> bool:
    if isinstance(modules, str):
        return _match(modules, layer) is not None
    return any(layer == module or layer.endswith(f".{module}") for module in modules)


def _of_pattern(patterns: Mapping[str, Any], layer: str, default: Any) -> Any:
    """Return the value of the first pattern that is the end of a layer's name, as PEFT does."""
    return next((value for key, value in patterns.items() if _match(rf"(.*\.)?({key})", layer)), default)


def _match(pattern: str, layer: str) -> Any:
    """Match a whole name. Raises regex.error, and TimeoutError for a pattern that would take for ever."""
    return regex.fullmatch(pattern, layer, timeout=MATCH_SECONDS)
