"""Small sentence encoders of random weights, of every family, in the format of sentence-transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

WORDS = ["answer", "like", "a", "lawyer", "the", "court", "finds", "write", "code", "##s", "##ing", ".", ",", "x"]
_COMMON = {"num_hidden_layers": 2, "num_attention_heads": 1, "intermediate_size": 10,
           "max_position_embeddings": 40, "hidden_act": "gelu"}  # fmt: skip
_OPTIONS: dict[str, dict[str, Any]] = {
    "bert": {"type_vocab_size": 2},
    "mpnet": {"relative_attention_num_buckets": 32},
    "gte": {"type_vocab_size": 1, "rope_parameters": {"rope_type": "default", "rope_theta": 1e3}},
}


def save_encoder(path: Path, family: str = "bert", pooling: str = "cls", normalize: bool = True, size: int = 6) -> Path:
    special = ["<s>", "<pad>", "</s>", "[UNK]"]
    vocab = {word: i for i, word in enumerate(special + WORDS)}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]", max_input_chars_per_word=100))  # noqa: S106
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    from tokenizers import decoders

    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(special)
    tokenizer.enable_truncation(8)
    torch.manual_seed(1)
    config = transformers.AutoConfig.for_model(
        family, vocab_size=len(vocab), pad_token_id=1, hidden_size=size, **_COMMON | _OPTIONS[family]
    )
    model = transformers.AutoModel.from_config(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.add_(torch.randn(parameter.shape) * 0.3)
    model.save_pretrained(path)
    tokenizer.save(str(path / "tokenizer.json"))
    modules = [("", "Transformer"), ("1_Pooling", "Pooling"), *([("2_Normalize", "Normalize")] if normalize else [])]
    write(path / "modules.json", [
        {"idx": i, "name": str(i), "path": at, "type": f"sentence_transformers.models.{kind}"}
        for i, (at, kind) in enumerate(modules)
    ])  # fmt: skip
    (path / "1_Pooling").mkdir()
    modes = {"cls": "cls_token", "mean": "mean_tokens", "max": "max_tokens"}
    write(path / "1_Pooling" / "config.json", {f"pooling_mode_{name}": mode == pooling for mode, name in modes.items()})
    write(path / "sentence_bert_config.json", {"max_seq_length": 32, "do_lower_case": False})
    return path


def write(file: Path, content: Any) -> None:
    file.write_text(json.dumps(content))
