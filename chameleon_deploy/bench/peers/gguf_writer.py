"""A base model, and a low-rank update of it, as GGUF files for llama.cpp."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as TensorType
from gguf.quants import quantize
from transformers.pytorch_utils import Conv1D

from chameleon_deploy.contract.adapter_file import Factors
from chameleon_deploy.contract.bundle import factor_names
from chameleon_deploy.reference.gguf import ARCHITECTURES, Architecture
from chameleon_deploy.reference.model import Trunk

FIELDS = {"attention.layer_norm_epsilon", "feed_forward_length"}  # what this writes of `Architecture.fields`


def write_gguf(trunk: Trunk, file: Path, tensor_type: TensorType, tokenizer: Path | None = None) -> None:
    """Write a model whose matrices have one type; norms, biases and position embeddings stay float32, as llama.cpp's
    own tool leaves them.

    tokenizer  a GGUF file whose tokenizer and chat template are copied; None writes neither

    Raises ValueError for a family with other fields or an offset of its norms, heads that are not a part of the hidden
    size, or rotary frequencies that need a table.
    """
    writer, names = gguf.GGUFWriter(file, trunk.config.model_type), _names(trunk)
    tensors = dict(_tensors(trunk, names))
    _write_hyperparameters(writer, trunk, tensors["blk.0.ffn_up.weight"].shape[0])
    if tokenizer is None:
        writer.add_tokenizer_model("no_vocab")
    else:
        _copy_tokenizer(writer, tokenizer)
    for name, tensor in tensors.items():
        is_matrix = tensor.ndim == 2 and not name.startswith("position_embd")
        raw_type = tensor_type if is_matrix else TensorType.F32
        writer.add_tensor(name, quantize(tensor, raw_type), raw_dtype=raw_type)
    _write(writer)


def write_lora(trunk: Trunk, factors: Factors, file: Path) -> None:
    """Write the factors of one adapter, in float32. Raises ValueError as `write_gguf` does."""
    writer, names = gguf.GGUFWriter(file, trunk.config.model_type), _names(trunk)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(len(next(iter(factors.values())))))  # scaled by alpha / rank
    for layer in trunk.linear_layers():
        lora_A, lora_B = (factors.get(name) for name in factor_names(layer))
        if lora_A is None or lora_B is None:
            continue
        name = _name(names, f"{layer}.weight")
        writer.add_tensor(f"{name}.lora_a", np.ascontiguousarray(lora_A))
        writer.add_tensor(f"{name}.lora_b", np.ascontiguousarray(_as_stored(name, lora_B.T, trunk)))
    _write(writer)


def _names(trunk: Trunk) -> Any:
    """Return the names that GGUF gives to a model's tensors. Raises ValueError."""
    family = _architecture(trunk).model_type
    (architecture,) = (number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == family)
    return gguf.get_tensor_name_map(architecture, trunk.config.num_hidden_layers)


def _architecture(trunk: Trunk) -> Architecture:
    """Return what GGUF stores otherwise for a family. Raises ValueError for a model that this cannot write."""
    config = trunk.config
    found = ARCHITECTURES.get(config.model_type)
    if found is None or found.norm_offset or not FIELDS.issuperset(found.fields):
        raise ValueError(f"no comparison with the family {config.model_type!r}")
    if trunk.head_dim * config.num_attention_heads != config.hidden_size:
        raise ValueError(f"no comparison with heads of {trunk.head_dim} channels")
    return found


def _name(names: Any, own: str) -> str:
    name: str | None = names.get_name(own, try_suffixes=(".weight", ".bias"))
    if name is None:
        raise ValueError(f"GGUF has no name for {own}")
    return name


def _write(writer: Any) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _copy_tokenizer(writer: Any, source: Path) -> None:
    for name, field in gguf.GGUFReader(source).fields.items():
        if name.startswith("tokenizer."):
            kind = field.types[0]
            of_items = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), kind, sub_type=of_items)


def _write_hyperparameters(writer: Any, trunk: Trunk, feed_forward_length: int) -> None:
    config = trunk.config
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(trunk.max_positions)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(feed_forward_length)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(trunk.num_key_value_heads)
    rope = getattr(config, "rope_parameters", None)
    if rope is None:
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
        return
    if rope["rope_type"] != "default":
        raise ValueError(f"no comparison with rotary embeddings of type {rope['rope_type']!r}")
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(trunk.head_dim)
    writer.add_rope_freq_base(rope["rope_theta"])


def _tensors(trunk: Trunk, names: Any) -> Any:
    """Yield the names that GGUF uses and float32 arrays [out, in]; a tied head is left out."""
    for module_name, module in trunk.causal_lm.named_modules():
        for kind, parameter in module.named_parameters(recurse=False):
            name = _name(names, f"{module_name}.{kind}")
            if name == "output.weight" and trunk.is_tied:
                continue
            tensor = parameter.detach().numpy()
            if isinstance(module, Conv1D) and tensor.ndim == 2:
                tensor = tensor.T
            yield name, np.ascontiguousarray(_as_stored(name, tensor, trunk))


def _as_stored(name: str, tensor: Any, trunk: Trunk) -> Any:
    """Return a tensor [out, ...] in the order of GGUF's output channels."""
    if _architecture(trunk).interleaved and name.rpartition(".")[0].endswith(("attn_q", "attn_k")):
        return _interleaved(tensor, trunk.head_dim)
    return tensor


def _interleaved(tensor: Any, head_dim: int) -> Any:
    """Reorder the rows of each head from channels that are half a head apart, as Hugging Face rotates them."""
    halves = tensor.reshape(-1, 2, head_dim // 2, *tensor.shape[1:])
    return halves.swapaxes(1, 2).reshape(tensor.shape)
