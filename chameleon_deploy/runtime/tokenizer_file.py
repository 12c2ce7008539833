"""tokenizer.json as `tokenizers` writes it: the parts that both runtimes have, every field, its type, and nothing else.

Both runtimes check the file against this before they read it, so that they refuse the same files.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Annotated, Any, Literal

import msgspec

from chameleon_deploy.runtime.tokenizer_pattern import pattern_fault

MAX_STEPS = 32  # of a sequence
MAX_GROWTH = 64  # characters that normalizers, or decoders, put in place of one; also of a prefix

UInt32 = Annotated[int, msgspec.Meta(ge=0, le=2**32 - 1)]
TokenId = Annotated[int, msgspec.Meta(ge=0, le=2**24 - 1)]  # bounds the tables of tokens; no vocabulary is that large
Character = Annotated[str, msgspec.Meta(min_length=1, max_length=1)]


class _Pattern(msgspec.Struct, forbid_unknown_fields=True):
    """Either of the two."""

    String: Annotated[str, msgspec.Meta(min_length=1)] | msgspec.UnsetType = msgspec.UNSET
    Regex: str | msgspec.UnsetType = msgspec.UNSET


class _Nfc(msgspec.Struct, tag_field="type", tag="NFC", forbid_unknown_fields=True):
    pass


class _Nfkc(msgspec.Struct, tag_field="type", tag="NFKC", forbid_unknown_fields=True):
    pass


class _Prepend(msgspec.Struct, tag_field="type", tag="Prepend", forbid_unknown_fields=True):
    prepend: Annotated[str, msgspec.Meta(max_length=MAX_GROWTH)]


class _Replace(msgspec.Struct, tag_field="type", tag="Replace", forbid_unknown_fields=True):
    pattern: _Pattern
    content: str


class _Strip(msgspec.Struct, tag_field="type", tag="Strip", forbid_unknown_fields=True):
    strip_left: bool
    strip_right: bool


class _BertNormalizer(msgspec.Struct, tag_field="type", tag="BertNormalizer", forbid_unknown_fields=True):
    clean_text: bool
    handle_chinese_chars: bool
    strip_accents: bool | None
    lowercase: bool


_Normalizer = _Nfc | _Nfkc | _Prepend | _Replace | _Strip | _BertNormalizer


class _Normalizers(msgspec.Struct, tag_field="type", tag="Sequence", forbid_unknown_fields=True):
    normalizers: Annotated[list[_Normalizer], msgspec.Meta(max_length=MAX_STEPS)]


class _ByteLevel(msgspec.Struct, tag_field="type", tag="ByteLevel", forbid_unknown_fields=True):
    add_prefix_space: bool
    trim_offsets: bool
    use_regex: bool


class _Digits(msgspec.Struct, tag_field="type", tag="Digits", forbid_unknown_fields=True):
    individual_digits: bool


class _Split(msgspec.Struct, tag_field="type", tag="Split", forbid_unknown_fields=True):
    pattern: _Pattern
    behavior: Literal["Removed", "Isolated", "MergedWithPrevious", "MergedWithNext", "Contiguous"]
    invert: bool


class _Metaspace(msgspec.Struct, tag_field="type", tag="Metaspace", forbid_unknown_fields=True):
    replacement: Character
    prepend_scheme: Literal["always", "never", "first"]
    split: bool


class _BertPreTokenizer(msgspec.Struct, tag_field="type", tag="BertPreTokenizer", forbid_unknown_fields=True):
    pass


_PreTokenizer = _ByteLevel | _Digits | _Split | _Metaspace | _BertPreTokenizer


class _PreTokenizers(msgspec.Struct, tag_field="type", tag="Sequence", forbid_unknown_fields=True):
    pretokenizers: Annotated[list[_PreTokenizer], msgspec.Meta(max_length=MAX_STEPS)]


class _ByteFallback(msgspec.Struct, tag_field="type", tag="ByteFallback", forbid_unknown_fields=True):
    pass


class _Fuse(msgspec.Struct, tag_field="type", tag="Fuse", forbid_unknown_fields=True):
    pass


class _StripDecoder(msgspec.Struct, tag_field="type", tag="Strip", forbid_unknown_fields=True):
    content: Character
    start: UInt32
    stop: Literal[0]  # `tokenizers` panics where a token is shorter than this


class _WordPieceDecoder(msgspec.Struct, tag_field="type", tag="WordPiece", forbid_unknown_fields=True):
    prefix: str
    cleanup: bool


_Decoder = _ByteLevel | _Replace | _ByteFallback | _Fuse | _StripDecoder | _Metaspace | _WordPieceDecoder


class _Decoders(msgspec.Struct, tag_field="type", tag="Sequence", forbid_unknown_fields=True):
    decoders: Annotated[list[_Decoder], msgspec.Meta(max_length=MAX_STEPS)]


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


class _Processors(msgspec.Struct, tag_field="type", tag="Sequence", forbid_unknown_fields=True):
    processors: Annotated[list[_ByteLevel | _Template], msgspec.Meta(max_length=MAX_STEPS)]


class _AddedToken(msgspec.Struct, forbid_unknown_fields=True):
    id: TokenId
    content: Annotated[str, msgspec.Meta(min_length=1)]
    single_word: bool
    lstrip: bool
    rstrip: bool
    normalized: bool
    special: bool


class _Bpe(msgspec.Struct, tag_field="type", tag="BPE", forbid_unknown_fields=True):
    dropout: Annotated[float, msgspec.Meta(ge=0, le=0)] | None
    unk_token: str | None
    continuing_subword_prefix: Literal[""] | None
    end_of_word_suffix: Literal[""] | None
    fuse_unk: bool
    byte_fallback: bool
    ignore_merges: bool
    vocab: dict[str, TokenId]
    merges: list[tuple[str, str]]


class _WordPiece(msgspec.Struct, tag_field="type", tag="WordPiece", forbid_unknown_fields=True):
    unk_token: str
    continuing_subword_prefix: str
    max_input_chars_per_word: Annotated[int, msgspec.Meta(ge=0, le=1000)]  # words take quadratic time
    vocab: dict[str, TokenId]


class _TokenizerFile(msgspec.Struct, forbid_unknown_fields=True):
    version: Literal["1.0"]
    truncation: None
    padding: None
    added_tokens: list[_AddedToken]
    normalizer: _Normalizer | _Normalizers | None
    pre_tokenizer: _PreTokenizer | _PreTokenizers | None
    post_processor: _ByteLevel | _Template | _Processors | None
    decoder: _Decoder | _Decoders
    model: _Bpe | _WordPiece


def file_fault(content: Any) -> str | None:
    """Return what of a decoded tokenizer.json is missing, unknown, of a wrong type or not taken, or None."""
    try:
        file = msgspec.convert(content, _TokenizerFile)
    except msgspec.ValidationError as error:
        return f"{error}: no runtime has this; export rewrites what another release of `tokenizers` wrote"
    return next(_faults(file), None)


def _faults(file: _TokenizerFile) -> Iterator[str]:
    normalizers = file.normalizer.normalizers if isinstance(file.normalizer, _Normalizers) else [file.normalizer]
    pre = file.pre_tokenizer.pretokenizers if isinstance(file.pre_tokenizer, _PreTokenizers) else [file.pre_tokenizer]
    decoders = file.decoder.decoders if isinstance(file.decoder, _Decoders) else [file.decoder]
    after = file.post_processor
    yield from _token_faults(file)
    for part, steps in (("normalizer", normalizers), ("pre_tokenizer", pre), ("decoder", decoders)):
        for step in steps:
            if isinstance(step, _Replace | _Split) and (fault := _pattern_fault(step.pattern)):
                yield f"{part}: {fault}"
        if _growth(steps) > MAX_GROWTH:
            yield f"{part}: a text can become more than {MAX_GROWTH} times as long"
    for i, step in enumerate(pre):
        is_first = isinstance(step, _Metaspace) and step.prepend_scheme == "first"
        if is_first and (i > 0 or file.normalizer is not None):
            yield "pre_tokenizer: Metaspace of scheme first is taken without normalizer, as the first step"
    processors = after.processors if isinstance(after, _Processors) else [after]
    templates = [step for step in processors if isinstance(step, _Template)]
    if len(templates) > 1:
        yield "post_processor: more than one template"
    for template in templates:
        yield from _template_faults(template)


def _token_faults(file: _TokenizerFile) -> Iterator[str]:
    model = file.model
    if model.unk_token is not None and model.unk_token not in model.vocab:
        yield f"model.unk_token: {model.unk_token!r:.100} is not in the vocabulary"
    if len(set(model.vocab.values())) < len(model.vocab):
        yield "model.vocab: two tokens have one id"
    if isinstance(model, _Bpe):
        for left, right in model.merges:
            if not {left, right, left + right} <= model.vocab.keys():
                yield f"model.merges: '{left} {right}' is not in the vocabulary"
    following, seen = len(model.vocab), set()
    for token in file.added_tokens:  # `tokenizers` gives a token that the vocabulary lacks the next free id
        expected = model.vocab.get(token.content)
        if expected is None:
            expected, following = following, following + 1
        if token.id != expected or token.content in seen:
            yield f"added_tokens: {token.content!r:.100} with id {token.id} would get the id {expected}"
        seen.add(token.content)


def _pattern_fault(pattern: _Pattern) -> str | None:
    if (pattern.String is msgspec.UNSET) == (pattern.Regex is msgspec.UNSET):
        return "a pattern is either String or Regex"
    return None if pattern.Regex is msgspec.UNSET else pattern_fault(pattern.Regex)


def _growth(steps: Iterable[Any]) -> int:
    return math.prod(max(1, len(step.content)) for step in steps if isinstance(step, _Replace))


def _template_faults(template: _Template) -> Iterator[str]:
    for token in template.special_tokens.values():
        if len(token.ids) != len(token.tokens):
            yield f"post_processor: special token {token.id!r} has {len(token.ids)} ids for {len(token.tokens)} tokens"
    for pieces, texts in ((template.single, {"A"}), (template.pair, {"A", "B"})):
        sequences = [piece["Sequence"].id for piece in pieces if "Sequence" in piece]
        if sorted(sequences) != sorted(texts):
            yield f"post_processor: a template of {sorted(texts)} holds the texts {sequences}"
        if any(piece["SpecialToken"].id not in template.special_tokens for piece in pieces if "SpecialToken" in piece):
            yield "post_processor: a template has an unknown special token"
