"""tokenizer.json as `tokenizers` writes it for byte-level BPE: every field, its type, and nothing else.

Both runtimes check the file against this before they read it, so that they refuse the same files.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec

UInt32 = Annotated[int, msgspec.Meta(ge=0, le=2**32 - 1)]
TokenId = Annotated[int, msgspec.Meta(ge=0, le=2**24 - 1)]  # bounds the tables of tokens; no vocabulary is that large


class _ByteLevel(msgspec.Struct, tag_field="type", tag="ByteLevel", forbid_unknown_fields=True):
    add_prefix_space: bool
    trim_offsets: bool
    use_regex: bool


class _Digits(msgspec.Struct, tag_field="type", tag="Digits", forbid_unknown_fields=True):
    individual_digits: bool


class _Steps(msgspec.Struct, tag_field="type", tag="Sequence", forbid_unknown_fields=True):
    pretokenizers: list[_ByteLevel | _Digits]


class _Piece(msgspec.Struct, forbid_unknown_fields=True):
    id: str
    type_id: UInt32


class _SpecialToken(msgspec.Struct, forbid_unknown_fields=True):
    id: str
    ids: list[UInt32]
    tokens: list[str]


# {"Sequence": piece} or {"SpecialToken": piece}
_Pieces = list[Annotated[dict[Literal["Sequence", "SpecialToken"], _Piece], msgspec.Meta(min_length=1, max_length=1)]]


class _Template(msgspec.Struct, tag_field="type", tag="TemplateProcessing", forbid_unknown_fields=True):
    single: _Pieces
    pair: _Pieces
    special_tokens: dict[str, _SpecialToken]


class _AddedToken(msgspec.Struct, forbid_unknown_fields=True):
    id: TokenId
    content: Annotated[str, msgspec.Meta(min_length=1)]
    single_word: bool
    lstrip: bool
    rstrip: bool
    normalized: bool
    special: bool


class _Model(msgspec.Struct, forbid_unknown_fields=True):
    type: Literal["BPE"]
    dropout: float | None
    unk_token: str | None
    continuing_subword_prefix: str | None
    end_of_word_suffix: str | None
    fuse_unk: bool
    byte_fallback: bool
    ignore_merges: bool
    vocab: dict[str, TokenId]
    merges: list[tuple[str, str]]


class _TokenizerFile(msgspec.Struct, forbid_unknown_fields=True):
    version: Literal["1.0"]
    truncation: None
    padding: None
    added_tokens: list[_AddedToken]
    normalizer: None
    pre_tokenizer: _ByteLevel | _Steps
    post_processor: _ByteLevel | _Template | None
    decoder: _ByteLevel
    model: _Model


def file_fault(content: Any) -> str | None:
    """Return what of a decoded tokenizer.json is missing, unknown or of a wrong type, or None."""
    try:
        file = msgspec.convert(content, _TokenizerFile)
    except msgspec.ValidationError as error:
        return f"{error}: export again"
    return _template_fault(file.post_processor) if isinstance(file.post_processor, _Template) else None


def _template_fault(template: _Template) -> str | None:
    for token in template.special_tokens.values():
        if len(token.ids) != len(token.tokens):
            return f"post_processor: special token {token.id!r} has {len(token.ids)} ids for {len(token.tokens)} tokens"
    for pieces, texts in ((template.single, {"A"}), (template.pair, {"A", "B"})):
        sequences = [piece["Sequence"].id for piece in pieces if "Sequence" in piece]
        if set(sequences) != texts:
            return f"post_processor: a template of {sorted(texts)} holds the texts {sequences}"
        if any(piece["SpecialToken"].id not in template.special_tokens for piece in pieces if "SpecialToken" in piece):
            return "post_processor: a template has an unknown special token"
    return None
