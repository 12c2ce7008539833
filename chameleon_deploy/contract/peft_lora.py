"""PEFT LoRA directories: low-rank updates of any linear layers, read and written without PyTorch.

Only plain low-rank updates are read: y + scaling * (x A^T) B^T, of a whole text or, if activated, from its last
invocation on. Everything else that PEFT can put into a directory is refused by the name of its option or tensor, as is
an option that this release does not know. What replaces weights of the base model, which rows share, is for
`reference/merging.py`.
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
from safetensors.numpy import save_file

from chameleon_deploy.contract.adapter_file import MAX_HEADER_BYTES, MAX_RANK, Factors, invocation_fault
from chameleon_deploy.contract.bundle import LM_HEAD, FloatArray, factor_names
from chameleon_deploy.contract.safetensors_file import FLOAT_DTYPES, StoredTensor, read_safetensors
from chameleon_deploy.directory import new_directory
from chameleon_deploy.errors import CheckpointError, DependencyError, TensorError

CONFIG_FILE, TENSOR_FILE = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
MAX_CONFIG_BYTES = 2**20
MATCH_SECONDS = 1  # of one pattern and one layer

# Options that do not change what a saved adapter computes.
_WITHOUT_EFFECT = {
    "auto_mapping", "revision", "peft_version", "task_type", "inference_mode",
    "lora_dropout", "fan_in_fan_out", "eva_config", "megatron_core", "runtime_config", "qalora_group_size",
    "ensure_weight_tying",
}  # fmt: skip
# Initialisations after which the base model is unchanged; PiSSA, OLoRA and others subtract the first factors from it.
_INITIALISATIONS = (None, True, False, "gaussian", "eva", "orthogonal")
_REASONS = {
    "use_dora": "DoRA rescales the base model's matrices, which the rows of a batch share: merge it with PEFT "
    "(merge_and_unload, save_pretrained), and export that directory",
    "lora_bias": "an update has no bias: merge it with PEFT (merge_and_unload, save_pretrained), and export that "
    "directory",
    "init_lora_weights": "it changed the base model before training: save the adapter as a plain one, PEFT's "
    "save_pretrained(path_initial_model_for_weight_conversion=...)",
    "target_parameters": "name the layers as target_modules",
}


class PeftConfig(msgspec.Struct, frozen=True):
    """The options of adapter_config.json that say which layers are adapted, and how."""

    r: int
    lora_alpha: float
    target_modules: list[str] | str
    peft_type: str = "LORA"
    base_model_name_or_path: str | None = None
    use_rslora: bool = False
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, float] | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    bias: str = "none"
    init_lora_weights: bool | str | None = None
    modules_to_save: list[str] | None = None
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    alora_invocation_tokens: list[int] | None = None

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
        found = (_layer_number(pattern, layer) for pattern in patterns or ["[^.]*"])
        number = next((number for number in found if number is not None), None)
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
    pairs = _pairs(path, _tensors(path, most_tensor_bytes(layers, head_weight)), head_weight)
    if unknown := sorted(pairs.keys() - layers.keys()):
        raise TensorError(f"{path}: adapts {unknown[0]!r}, which is not among the linear layers that can be adapted")
    if not wanted or pairs.keys() != wanted:
        differing = sorted(pairs.keys() ^ wanted)
        raise TensorError(f"{path}: its tensors and target_modules differ at {differing or 'every layer'}")
    largest = max(ranks.values())
    values = np.zeros(largest * sum(sum(layers[layer]) for layer in pairs), np.float32)  # one block, of all factors
    factors = {}
    for layer in (name for name in layers if name in pairs):  # in the order of the model
        for name, stored, width in zip(factor_names(layer), pairs[layer], layers[layer], strict=True):
            is_B = name == factor_names(layer)[1]
            matrix = stored.array().T if is_B else stored.array()
            if matrix.shape != (ranks[layer], width):
                raise TensorError(f"{path}: {name} has shape {matrix.shape}, not {(ranks[layer], width)}")
            scaling = scalings[layer] if is_B else 1.0
            factors[name] = values[: largest * width].reshape(largest, width)
            values = values[largest * width :]
            with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is refused
                # Without arrays in between, which each thread that loads adapters would keep room for.
                np.multiply(matrix, np.float32(scaling), out=factors[name][: ranks[layer]], dtype=np.float32)
            if not (np.isfinite(factors[name].min()) and np.isfinite(factors[name].max())):
                raise TensorError(f"{path}: {name}, scaled by {scaling:g}, holds NaN, infinity or beyond float32")
    return factors


def most_tensor_bytes(layers: Mapping[str, tuple[int, int]], head_weight: Any = None) -> int:
    """Return the size that the tensors of no adapter exceed: all layers with the largest rank and a head, float64."""
    values = sum(map(sum, layers.values())) * MAX_RANK + (0 if head_weight is None else np.asarray(head_weight).size)
    return MAX_HEADER_BYTES + 8 * int(values)


def read_invocation(path: Path) -> tuple[int, ...]:
    """Return the invocation tokens of an activated adapter, none of another. Raises CheckpointError."""
    return tuple(read_config(path / CONFIG_FILE).alora_invocation_tokens or ())


def write_peft(out: Path, factors: Factors) -> None:
    """Write factors, "<layer>.lora_A" [rank, in] and "<layer>.lora_B" [rank, out], as a PEFT LoRA of scaling 1.

    Layers are named in full, so that the directory is of this model only.

    Raises OutputExistsError or OutputError.
    """
    layers = [name.removesuffix(".lora_A") for name in factors if name.endswith(".lora_A")]
    rank = len(next(iter(factors.values())))
    tensors = {}
    for layer in layers:
        lora_A, lora_B = (factors[name] for name in factor_names(layer))
        tensors[f"{PREFIX}{layer}.lora_A.weight"] = np.ascontiguousarray(lora_A, np.float32)
        tensors[f"{PREFIX}{layer}.lora_B.weight"] = np.ascontiguousarray(lora_B.T, np.float32)
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": None, "inference_mode": True,
        "r": rank, "lora_alpha": rank, "target_modules": layers, "bias": "none", "lora_dropout": 0.0,
    }  # fmt: skip
    with new_directory(out) as directory:
        (directory / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        save_file(tensors, directory / TENSOR_FILE, {"format": "pt"})


def read_config(file: Path, merged: bool = False) -> PeftConfig:
    """Read adapter_config.json. Raises CheckpointError, also for every option with an effect that is not read here.

    merged  whether options that replace weights of the base model are taken
    """
    try:
        if not file.is_file():
            raise CheckpointError(f"{file} is missing, or no plain file")
        with file.open("rb") as opened:
            content = opened.read(MAX_CONFIG_BYTES + 1)
        if len(content) > MAX_CONFIG_BYTES:
            raise CheckpointError(f"{file}: over {MAX_CONFIG_BYTES} bytes are no PEFT LoRA configuration")
        raw = msgspec.json.decode(content)  # which takes no NaN and no infinity
        config = msgspec.convert(raw, PeftConfig)
    except OSError as error:
        raise CheckpointError(f"{file}: {error.strerror}") from error
    except (msgspec.MsgspecError, RecursionError) as error:
        raise CheckpointError(f"{file}: not a PEFT LoRA configuration: {error}") from error
    refused = [
        name for name, value in raw.items() if value and name not in {*PeftConfig.__struct_fields__} | _WITHOUT_EFFECT
    ]
    if config.peft_type != "LORA":
        refused.append(f"peft_type={config.peft_type}")
    if config.init_lora_weights not in _INITIALISATIONS:
        refused.append(f"init_lora_weights={config.init_lora_weights}")
    if refused:
        known = (_REASONS.get(option.partition("=")[0]) for option in refused)
        reason = next(filter(None, known), "only a plain low-rank update can be deployed")
        raise CheckpointError(f"{file}: {', '.join(refused)}: {reason}")
    if merged and config.alora_invocation_tokens:
        reason = "an activated adapter changes a part of each text, so it is merged into no base model"
        raise CheckpointError(f"{file}: alora_invocation_tokens: {reason}")
    if not merged and (replaced := replacing_options(config)):
        raise CheckpointError(f"{file}: {', '.join(replaced)}: {own_bundle(file.parent)}")
    ranks = [config.r, *(config.rank_pattern or {}).values()]
    if min(ranks) < 1 or max(ranks) > MAX_RANK:
        raise CheckpointError(f"{file}: ranks {min(ranks)} to {max(ranks)}: they must be from 1 to {MAX_RANK}")
    if config.alora_invocation_tokens and (fault := invocation_fault(config.alora_invocation_tokens)):
        raise CheckpointError(f"{file}: alora_invocation_tokens {fault}")
    return config


def replacing_options(config: PeftConfig) -> list[str]:
    """Return the options that replace weights of the base model."""
    given = {"modules_to_save": config.modules_to_save, "trainable_token_indices": config.trainable_token_indices}
    return [*(name for name, value in given.items() if value), *[f"bias={config.bias}"] * (config.bias != "none")]


def is_of_the_head(config: PeftConfig) -> bool:
    """Return whether an adapter updates the head alone."""
    targets = [config.target_modules] if isinstance(config.target_modules, str) else config.target_modules
    return targets == [LM_HEAD] and not replacing_options(config)


def own_bundle(path: Path) -> str:
    """Return what to do with a directory that replaces weights of the base model."""
    return (
        "it replaces weights of the base model, which the rows of a batch share: export it as a bundle of its own, "
        f"python -m chameleon_deploy.export {path} --out BUNDLE"
    )


def _tensors(path: Path, limit: int) -> dict[str, StoredTensor]:
    """Return the tensors of a file of at most so many bytes. Raises CheckpointError or TensorError."""
    file = path / TENSOR_FILE
    if not file.is_file():
        raise CheckpointError(f"{file} is missing: save the adapter with safe_serialization=True")
    try:
        if file.stat().st_size > limit:
            raise CheckpointError(f"{file}: over {limit} bytes are no LoRA of this model")
        tensors = read_safetensors(file, limit).tensors
    except OSError as error:
        raise CheckpointError(f"{file}: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"{file}: {error}") from error
    for name, tensor in tensors.items():
        if tensor.dtype not in FLOAT_DTYPES:
            raise TensorError(f"{path}: {name} is {tensor.dtype}: save it as {', '.join(FLOAT_DTYPES)}")
    return tensors


def _pairs(path: Path, tensors: dict[str, StoredTensor], head_weight: Any) -> dict[str, tuple[StoredTensor, ...]]:
    """Return the A [rank, in] and B [out, rank] of every layer. Raises TensorError for any other tensor."""
    stored_head = tensors.pop(f"{PREFIX}{LM_HEAD}.base_layer.weight", None)
    if stored_head is not None and not _is_equal(stored_head.array(), head_weight):
        raise TensorError(f"{path}: its {LM_HEAD} differs from the base model's: {own_bundle(path)}")
    found: dict[str, dict[str, StoredTensor]] = {}
    for name, tensor in tensors.items():
        match = re.fullmatch(rf"{re.escape(PREFIX)}(.+)\.lora_([AB])\.weight", name)
        if not match:
            known = "only lora_A and lora_B of linear layers can be deployed"
            whole = "lora_" not in name or "lora_embedding_" in name
            raise TensorError(f"{path}: tensor {name!r}: {own_bundle(path) if whole else known}")
        found.setdefault(match[1], {})[match[2]] = tensor
    for layer, pair in found.items():
        if len(pair) < 2 or any(len(matrix.shape) != 2 for matrix in pair.values()):
            raise TensorError(f"{path}: {layer} needs lora_A and lora_B, both matrices")
    return {layer: (pair["A"], pair["B"]) for layer, pair in found.items()}


def _is_equal(stored: FloatArray, head_weight: Any) -> bool:
    return head_weight is not None and bool(np.array_equal(stored, np.asarray(head_weight)))


def _matches(modules: list[str] | str, layer: str) -> bool:
    if isinstance(modules, str):
        return _match(modules, layer) is not None
    return any(layer == module or layer.endswith(f".{module}") for module in modules)


def _of_pattern(patterns: Mapping[str, Any], layer: str, default: Any) -> Any:
    """Return the value of the first pattern that is the end of a layer's name, as PEFT does."""
    return next((value for key, value in patterns.items() if _match(rf"(.*\.)?({key})", layer)), default)


def _layer_number(pattern: str, layer: str) -> int | None:
    """Return the number after a pattern of `layers_pattern` in a layer's name. Raises what `_match` does."""
    match = _match(rf"(?:^|.*?\.){pattern}\.(\d+)\..*", layer)
    if match and match.re.groups > 1:  # PEFT takes the first for the number
        raise CheckpointError(f"{CONFIG_FILE}: layers_pattern {pattern!r:.80} has a group: write (?:...)")
    return int(match[1]) if match else None


def _match(pattern: str, layer: str) -> Any:
    """Match a whole name. Raises CheckpointError, and TimeoutError for a pattern that would take for ever."""
    try:
        import regex  # which most adapters do without
    except ModuleNotFoundError as error:
        raise DependencyError(f"{CONFIG_FILE} has patterns: pip install regex") from error
    try:
        return regex.fullmatch(pattern, layer, timeout=MATCH_SECONDS)
    except regex.error as error:
        raise CheckpointError(f"{CONFIG_FILE}: {pattern!r:.80}: {error}") from error
