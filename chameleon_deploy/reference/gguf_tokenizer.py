"""The tokenizer inside a GGUF file, as tokenizer.json of the same model has it.

A file holds tokens, merges or scores, and names of an algorithm and of a pre-tokenizer, which stand for what follows
(https://github.com/ggml-org/llama.cpp/blob/master/src/llama-vocab.cpp).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from chameleon_deploy.errors import UnsupportedBaseError

UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 2, 3, 4, 5  # token types; others are words and bytes
SPACE = "\u2581"  # what sentencepiece writes for a space

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_QWEN2 = rf"{_CONTRACTIONS}|{_LETTERS}|\p{{N}}{_REST}"
_LLAMA3 = rf"{_CONTRACTIONS}|{_LETTERS}|\p{{N}}{{1,3}}{_REST}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+%s|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*%s"
_CASED_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT4O = _CASED % (f"{_CONTRACTIONS}?", f"{_CONTRACTIONS}?") + r"|\p{N}{1,3}" + _CASED_REST
_TEKKEN = _CASED % ("", "") + r"|\p{N}" + _CASED_REST
SPLITS = {
    "qwen2": _QWEN2, "deepseek-r1-qwen": _QWEN2,
    "llama-bpe": _LLAMA3, "llama3": _LLAMA3, "llama-v3": _LLAMA3, "smaug-bpe": _LLAMA3, "dbrx": _LLAMA3,
    "gpt-4o": _GPT4O, "tekken": _TEKKEN,
}  # fmt: skip
PLAIN = ("gpt-2", "olmo")  # GPT-2's own expression
DIGITS = ("smollm", "refact", "starcoder")  # each digit alone, then GPT-2's expression
WHOLE_WORDS = ("llama-bpe", "llama3", "llama-v3", "tekken")  # a word that is a token needs no merges
NORMALIZED = ("qwen2", "deepseek-r1-qwen", "olmo")  # to NFC


def tokenizer_of(keys: Mapping[str, Any], where: str) -> Tokenizer:
    """Return the tokenizer of a file's key-value pairs.

    where  the file, for messages

    Raises UnsupportedBaseError for an algorithm or a pre-tokenizer that is not known here.
    """
    kind, tokens = keys.get("tokenizer.ggml.model"), keys.get("tokenizer.ggml.tokens", [])
    types = keys.get("tokenizer.ggml.token_type") or [1] * len(tokens)
    if kind == "gpt2":
        tokenizer = _byte_level(keys, tokens, types, where)
    elif kind == "llama":  # runs of spaces are written as they are, all other spaces are not
        tokens = [token if token.strip(" ") else SPACE * len(token) for token in tokens]
        tokenizer = _sentencepiece(keys, tokens, types)
    else:
        raise UnsupportedBaseError(f"{where}: a tokenizer of the kind {kind!r}: pass the Hugging Face directory")
    added = [
        AddedToken(token, normalized=False, special=token_type == CONTROL)
        for token, token_type in zip(tokens, types, strict=True)
        if token_type in (CONTROL, USER_DEFINED)
    ]
    tokenizer.add_tokens(added)
    if keys.get("tokenizer.ggml.add_bos_token", kind == "llama") and "tokenizer.ggml.bos_token_id" in keys:
        begin = keys["tokenizer.ggml.bos_token_id"]
        name = tokens[begin]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[name, "$A"], pair=[name, "$A", f"{name}:1", "$B:1"], special_tokens=[(name, begin)]
        )
    return tokenizer


def _byte_level(keys: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int], where: str) -> Tokenizer:
    known = "gpt-2" if keys.get("general.architecture") == "gpt2" else None  # files from before the key
    name = keys.get("tokenizer.ggml.pre", known)
    if name not in (*SPLITS, *PLAIN, *DIGITS):
        raise UnsupportedBaseError(
            f"{where}: its pre-tokenizer {name!r} is not known here: pass the Hugging Face directory"
        )
    vocab = {token: i for i, token in enumerate(tokens) if types[i] != UNUSED}  # those fill the embedding up
    merges = [tuple(merge.split(" ", 1)) for merge in keys["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=name in WHOLE_WORDS))
    by_expression = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if name in SPLITS:
        steps = [
            pre_tokenizers.Split(Regex(SPLITS[name]), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    elif name in DIGITS:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), by_expression]
        )
    else:
        tokenizer.pre_tokenizer = by_expression
    if name in NORMALIZED:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return tokenizer


def _sentencepiece(keys: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int]) -> Tokenizer:
    """Return byte-pair encoding whose merges follow from the pieces: the best piece first.

    Gemma's scores do not follow the order of its merges, which that of its tokens does.
    """
    from transformers.tokenization_utils_base import generate_merges

    is_gemma = str(keys.get("general.architecture")).startswith("gemma")
    vocab = {token: i for i, token in enumerate(tokens)}
    ranks = {token: -i for token, i in vocab.items()}
    scores = ranks if is_gemma else dict(zip(tokens, keys["tokenizer.ggml.scores"], strict=True))
    unknown = next((token for token, kind in zip(tokens, types, strict=True) if kind == UNKNOWN), None)
    if unknown is None and "tokenizer.ggml.unknown_token_id" in keys:
        unknown = tokens[keys["tokenizer.ggml.unknown_token_id"]]
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocab, merges=generate_merges(vocab, scores), unk_token=unknown, fuse_unk=True, byte_fallback=True
        )
    )
    spaces = normalizers.Replace(" ", SPACE)
    decoding = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if keys.get("tokenizer.ggml.add_space_prefix", not is_gemma):
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), spaces])
        decoding.append(decoders.Strip(" ", 1, 0))
    else:
        tokenizer.normalizer = spaces
    tokenizer.decoder = decoders.Sequence(decoding)
    return tokenizer
