"""The tokenizer of a bundle. A text's token ids must depend on that text only, and represent all of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
from tokenizers import Tokenizer

from chameleon_deploy.errors import ManifestError, RequestError
from chameleon_deploy.runtime.tokenizer_file import file_fault


def load_tokenizer(file: Path) -> Any:
    """Return the `tokenizers.Tokenizer` of a bundle's tokenizer.json: byte-level BPE, as both runtimes read it.

    Raises ManifestError for a file that `tokenizers` does not read, for one that pads, truncates or has dropout
    (padding makes a text's ids depend on other rows, dropout makes them random), and for any other kind of tokenizer:
    some of them cannot decode one token at a time.
    """
    try:
        content = msgspec.json.decode(file.read_bytes())
        fault = _fault(content) or file_fault(content)
        tokenizer = None if fault else Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises Exception itself; RecursionError, for nested lists, is one too
        raise ManifestError(f"{file}: {error}") from error
    if fault:
        raise ManifestError(f"{file}: {fault}")
    return tokenizer


def decode(tokenizer: Any, token_ids: Sequence[int]) -> str:
    """Return the text of token ids without special tokens. Raises RequestError if `tokenizers` fails or panics."""
    try:
        return str(tokenizer.decode(token_ids, skip_special_tokens=True))
    except BaseException as error:
        raise _as_request_error(error) from error


def decode_next(stream: Any, tokenizer: Any, token_id: int) -> str:
    """Return the text of a `DecodeStream` for one more token. Raises RequestError as `decode` does."""
    try:
        return stream.step(tokenizer, token_id) or ""
    except BaseException as error:
        raise _as_request_error(error) from error


def _as_request_error(error: BaseException) -> RequestError:
    """Return a RequestError for an error or a panic, which is no Exception. Errors that end the process pass."""
    if isinstance(error, KeyboardInterrupt | SystemExit | GeneratorExit | MemoryError):
        raise error
    return RequestError(f"the tokenizer cannot decode this row: {error}")


def _fault(content: Any) -> str | None:
    """Return what a tokenizer.json has that is not supported, or None; the C++ runtime says the same."""
    model = content.get("model") or {}
    for part, type_name in (("model", "BPE"), ("decoder", "ByteLevel")):
        if (content.get(part) or {}).get("type") != type_name:
            return f"{part} is not of type {type_name}"
    for name, value in (
        ("truncation", content.get("truncation")), ("padding", content.get("padding")),
        ("model.dropout", model.get("dropout") or None),
    ):  # fmt: skip
        if value is not None:
            return f"{name} is not supported: export again, which sets it to null"
    if content.get("normalizer") is not None:
        return "normalizer is not supported"
    for name in ("unk_token", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "ignore_merges"):
        if model.get(name):
            return f"model.{name} is not supported"
    return _word_fault(content.get("pre_tokenizer"))


def _word_fault(pre_tokenizer: Any) -> str | None:
    """Words are those of GPT-2, or digits first, as in SmolLM."""
    byte_level = pre_tokenizer or {}
    if byte_level.get("type") == "Sequence":
        steps = byte_level.get("pretokenizers") or []
        if len(steps) != 2 or steps[0].get("type") != "Digits" or not steps[0].get("individual_digits"):
            return "pre_tokenizer is a Sequence other than Digits (individual_digits) and ByteLevel"
        byte_level = steps[1]
    if byte_level.get("type") != "ByteLevel":
        return "pre_tokenizer is neither ByteLevel nor Digits and ByteLevel"
    return None if byte_level.get("use_regex", True) else "use_regex=false is not supported"
