"""Writes tests/data/gguf: a small random model of each family, as llama.cpp's own converter writes it.

    python -m tests.gguf_files LLAMA_CPP

LLAMA_CPP is a checkout of https://github.com/ggml-org/llama.cpp with convert_hf_to_gguf.py; the files in the repository
were made by that of the source archive of llama-cpp-python 0.3.36. FAMILY.gguf has matrices of float16, so that weights
are restored exactly, and FAMILY.safetensors the logits that transformers gives for the last SHOWN of
IDS before the conversion.
"""

from __future__ import annotations

import importlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file

from chameleon_deploy.reference.families import FAMILIES
from chameleon_deploy.reference.python_corpus import KINDS, python_texts
from chameleon_deploy.reference.tiny import save_base, train_tokenizer
from tests.families import small_model
from tests.shared_data import DATA

FILES = DATA / "gguf"
VOCAB_SIZE = 272
SHOWN = 6  # last positions whose logits are kept
IDS = torch.arange(7, 7 * 25, 7)[None] % VOCAB_SIZE
_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2,
}  # fmt: skip
# What a file does not tell is that of the published models: where layers have windows, which have no rotary embedding,
# and by what queries are scaled.
_PUBLISHED: dict[str, dict[str, Any]] = {
    "gpt2": {"n_inner": None, "n_ctx": 64},
    "mistral": {"head_dim": 16, "sliding_window": None},
    "qwen2": {"use_sliding_window": False},
    "qwen3": {"head_dim": 16},
    "smollm3": {"num_hidden_layers": 4, "no_rope_layers": None, "tie_word_embeddings": True},
    "gpt_neox": {"num_attention_heads": 1},
    "phi3": {"num_key_value_heads": 1, "hidden_size": 64, "sliding_window": 64, "rope_parameters": {
        "rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": 0.5,
        "original_max_position_embeddings": 64, "short_factor": [1.5] * 8, "long_factor": [4.0] * 8}},
    "gemma2": {"num_hidden_layers": 4, "head_dim": 16, "query_pre_attn_scalar": 16, "layer_types": None},
    "gemma3_text": {"num_hidden_layers": 7, "head_dim": 16, "query_pre_attn_scalar": 16, "layer_types": None,
                    "rope_local_base_freq": 2e4},
}  # fmt: skip
_GROUPED = {"num_key_value_heads": 1}


def small(family: str) -> Any:
    """Return a family's model with weights that float16 holds exactly."""
    grouped = {} if family in ("gpt2", "gpt_neox") else _GROUPED
    model = small_model(family, **_SIZES | grouped | _PUBLISHED.get(family, {}))
    for parameter in model.parameters():
        parameter.copy_(parameter.half().float())
    return model


def write(family: str, convert: Any) -> None:
    """Write the two files of a family."""
    model = small(family)
    tokenizer = train_tokenizer(python_texts(sorted(KINDS)[0], 50), VOCAB_SIZE)
    with tempfile.TemporaryDirectory() as directory:
        save_base(model, tokenizer, Path(directory))
        config = Path(directory, "config.json")
        fields = json.loads(config.read_text())
        if family == "gpt_neox":  # where releases before transformers 5 have it
            fields["rotary_pct"] = fields["rope_parameters"]["partial_rotary_factor"]
        config.write_text(json.dumps(fields))
        sys.argv = ["convert", directory, "--outfile", str(FILES / f"{family}.gguf"), "--outtype", "f16"]
        convert()
    save_file({"logits": model(IDS).logits[0, -SHOWN:].contiguous()}, FILES / f"{family}.safetensors")


def main(llama_cpp: str) -> None:
    """Convert all families."""
    sys.path[:0] = [llama_cpp, f"{llama_cpp}/gguf-py"]
    convert = importlib.import_module("convert_hf_to_gguf").main
    base, gptneox, phi = (importlib.import_module(f"conversion.{name}") for name in ("base", "gptneox", "phi"))

    transformers.logging.set_verbosity_error()
    # The converter knows the tokenizers of published models by their hash; those of these models are GPT-2's kind.
    base.TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
    base.TextModel._set_vocab_sentencepiece = lambda self: self._set_vocab_gpt2()
    phi.Phi3MiniModel.set_vocab = lambda self: self._set_vocab_gpt2()
    of_neox = gptneox.GPTNeoXModel.set_gguf_parameters

    def with_rotary_pct(self: Any) -> None:  # which transformers 5 takes out of the configuration
        self.hparams.setdefault("rotary_pct", self.hparams["rope_parameters"]["partial_rotary_factor"])
        of_neox(self)

    gptneox.GPTNeoXModel.set_gguf_parameters = with_rotary_pct
    FILES.mkdir(exist_ok=True)
    for family in FAMILIES:
        write(family, convert)


if __name__ == "__main__":
    main(sys.argv[1])
