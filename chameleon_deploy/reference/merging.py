"""A PEFT LoRA merged into its base model: what the rows of a batch cannot share becomes a base model of its own.

Beside updates of linear layers it may hold whole weights (`modules_to_save`, a resized vocabulary, biases), an update
of the embedding, and trained rows of it. The result is what PEFT computes after `PeftModel.from_pretrained`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from chameleon_deploy.contract.peft_lora import CONFIG_FILE, PREFIX, TENSOR_FILE, PeftConfig, read_config
from chameleon_deploy.errors import CheckpointError, TensorError
from chameleon_deploy.reference.checkpoint import check_finite, read_tensors, resolve_base
from chameleon_deploy.reference.model import Trunk, load_trunk, tokenizers_of

_FACTOR = re.compile(r"(.+)\.lora_(?:embedding_)?([AB])(?:\.weight)?")
_TRAINED_ROWS = ".token_adapter.trainable_tokens_delta"
_WRAPPED = re.compile(r"(?:\.token_adapter)?\.(?:base_layer|original_module)\.")  # a weight of the base model itself
_COPY = ".modules_to_save."


def load_merged(path: Path, base: str | None = None) -> Trunk:
    """Load the base model of a PEFT directory and merge the directory into it.

    base  the base model, if the directory does not name one or its path has moved

    A tokenizer in the directory takes the place of the base model's.

    Raises the errors of `read_config` and `load_trunk`, CheckpointError where a file is missing, TensorError for
    tensors that do not fit the base model.
    """
    config = read_config(path / CONFIG_FILE, merged=True)
    named = base or config.base_model_name_or_path
    if not named:
        raise CheckpointError(f"{path / CONFIG_FILE} names no base model: pass --base")
    tensors = read_tensors(path / TENSOR_FILE)
    for name, tensor in tensors.items():
        check_finite(path, name, tensor)
    trunk = load_trunk(resolve_base(path, named))
    try:
        merge(trunk, config, {name.removeprefix(PREFIX): tensor.float() for name, tensor in tensors.items()})
    except TensorError as error:
        raise TensorError(f"{path}: {error}") from error
    if (path / "tokenizer.json").is_file():
        tokenizer, trunk.transformers_tokenizer, chat = tokenizers_of(path, {"local_files_only": True})
        trunk.tokenizer = tokenizer
        trunk.chat = chat if chat.source() else trunk.chat
    return trunk


@torch.no_grad()
def merge(trunk: Trunk, config: PeftConfig, tensors: Mapping[str, Tensor]) -> None:
    """Change the weights of a base model into those that an adapter makes of them.

    tensors  of the adapter, by their names within the base model

    Raises TensorError.
    """
    model, was_tied = trunk.causal_lm, trunk.is_tied
    _resize(trunk, tensors)
    factors: dict[str, dict[str, Tensor]] = {}
    whole: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if match := _FACTOR.fullmatch(name):
            factors.setdefault(match[1], {})[match[2]] = tensor
        elif _WRAPPED.search(name) or not _is_saved(config, name):
            if not name.endswith(_TRAINED_ROWS):
                _parameter(model, _WRAPPED.sub(".", name), tensor.shape).data = tensor
        else:
            whole[name.replace(_COPY, ".")] = tensor
    for name, tensor in tensors.items():
        if name.endswith(_TRAINED_ROWS):
            _train_rows(model, config, name.removesuffix(_TRAINED_ROWS), tensor)
    # From here on a module that shares its weight with another gets one of its own, as PEFT's copies and updates are.
    for name, tensor in whole.items():
        _parameter(model, name, tensor.shape)
        _replace(model, name, tensor)
    _check_layers(model, config, factors)
    for layer, pair in factors.items():
        _replace(model, f"{layer}.weight", _updated(model, config, layer, pair))
    if was_tied and torch.equal(trunk.token_embedding, trunk.head_weight):
        model.get_output_embeddings().weight = model.get_input_embeddings().weight


def _resize(trunk: Trunk, tensors: Mapping[str, Tensor]) -> None:
    """Give the base model the vocabulary that an adapter has stored weights for. Raises TensorError."""
    model = trunk.causal_lm
    ends = model.get_input_embeddings(), model.get_output_embeddings()
    names = {f"{name}.weight" for name, module in model.named_modules() if module in ends}
    sizes = {len(tensor) for name, tensor in tensors.items() if _WRAPPED.sub(".", name).replace(_COPY, ".") in names}
    if len(sizes) > 1:
        raise TensorError(f"its embedding and head have vocabularies of {sorted(sizes)}")
    if sizes and sizes != {len(trunk.token_embedding)}:
        model.resize_token_embeddings(*sizes, mean_resizing=False)


def _is_saved(config: PeftConfig, name: str) -> bool:
    """Return whether a weight is one of `modules_to_save`, whose names PEFT compares with the ends of modules'."""
    module = name.replace(_COPY, ".").rpartition(".")[0]
    return module.endswith(tuple(config.modules_to_save or ()))


def _parameter(model: Any, name: str, shape: Sequence[int] | None = None) -> Any:
    """Return a parameter, which must have a shape where one is given. Raises TensorError."""
    try:
        parameter = model.get_parameter(name)
    except AttributeError as error:
        raise TensorError(f"the base model has no {name}") from error
    if shape is not None and parameter.shape != shape:
        raise TensorError(f"{name} has shape {tuple(shape)}, the base model's {tuple(parameter.shape)}")
    return parameter


def _replace(model: Any, name: str, tensor: Tensor) -> None:
    module, _, parameter = name.rpartition(".")
    setattr(model.get_submodule(module), parameter, nn.Parameter(tensor.contiguous(), requires_grad=False))


def _train_rows(model: Any, config: PeftConfig, module: str, rows: Tensor) -> None:
    """Put trained rows into a weight; a weight that several modules share stays shared. Raises TensorError."""
    given = config.trainable_token_indices
    if isinstance(given, dict):
        given = next((given[name] for name in given if f".{module}".endswith(f".{name}")), None)
        if given is None:  # the same rows once more, under the name of a module that shares the weight
            return
    parameter = _parameter(model, f"{module}.weight")
    fits = rows.shape == (len(given or ()), parameter.shape[1])
    if not given or not fits or min(given) < 0 or max(given) >= len(parameter):
        raise TensorError(f"trainable_token_indices and the trained rows of {module} do not fit")
    weight = parameter.detach().clone()
    weight[given] = rows
    parameter.data = weight


def _check_layers(model: Any, config: PeftConfig, factors: Mapping[str, Any]) -> None:
    """Check that the tensors are of the layers that the options name. Raises TensorError."""
    from transformers.pytorch_utils import Conv1D

    kinds = (nn.Linear, Conv1D, nn.Embedding)
    wanted = {name for name, module in model.named_modules() if isinstance(module, kinds) and config.adapts(name)}
    if differing := sorted(wanted ^ factors.keys()):
        raise TensorError(f"its tensors and target_modules differ at {differing[:3]}")


def _updated(model: Any, config: PeftConfig, layer: str, pair: Mapping[str, Tensor]) -> Tensor:
    """Return the weight of a layer with its low-rank update. Raises TensorError."""
    module, rank = model.get_submodule(layer), config.rank(layer)
    fits = pair.keys() == {"A", "B"} and all(tensor.ndim == 2 for tensor in pair.values())
    if not fits or (len(pair["A"]), pair["B"].shape[1]) != (rank, rank):
        raise TensorError(f"{layer} needs lora_A and lora_B of rank {rank}")
    update = config.scaling(layer) * (pair["B"] @ pair["A"])  # [out, in]
    if not isinstance(module, nn.Linear):  # an embedding, or a Conv1D
        update = update.T
    if update.shape != module.weight.shape:
        raise TensorError(f"the update of {layer} is {tuple(update.shape)}, its weight {tuple(module.weight.shape)}")
    weight: Tensor = module.weight + update
    if not torch.isfinite(weight).all():
        raise TensorError(f"{layer} with its update holds NaN or infinity")
    return weight
