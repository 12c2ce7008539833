"""Token ids of a rendered conversation, whose messages cannot spell control tokens."""

from __future__ import annotations

import re
import secrets
from collections.abc import Sequence
from typing import Any

from tokenizers import AddedToken, Tokenizer

from chameleon_deploy.errors import InputError


class ControlTokens:
    """The control tokens of a tokenizer, which only the template may write.

    They are the added tokens, special or not, that the tokenizer's model does not give for their text anyway; those it
    does, such as Gemma's line breaks, are plain text. In a copy of the tokenizer they have spellings that nobody else
    knows, so that the rest of the tokenizer, whatever it is, reads the text around them as it does in the original.

    first, last  characters that they begin and end with
    pattern      matches the longest at a place
    """

    def __init__(self, tokenizer: Any) -> None:
        added = tokenizer.get_added_tokens_decoder()
        secret = secrets.token_hex(8)
        spelled = {token.content: f"\ufdd0{secret}{i:x}\ufdd1" for i, token in enumerate(added.values())}
        plain = _copy(tokenizer, [_with_content(token, spelled[token.content]) for token in added.values()])
        found = plain.encode_batch([token.content for token in added.values()], add_special_tokens=False)
        control = {
            token.content: token_id
            for (token_id, token), encoding in zip(added.items(), found, strict=True)
            if token_id not in encoding.ids and not token.single_word
        }
        some = [_with_content(t, spelled[t.content]) if t.content in control else t for t in added.values()]
        self._tokenizer = plain if len(control) == len(added) else _copy(tokenizer, some)
        self._spelled = {text: spelled[text] for text in control}
        # An added token may get another id in the copy, where its text is in the model's vocabulary too.
        self._ids = {self._tokenizer.token_to_id(spelled[text]): token_id for text, token_id in control.items()}
        self.first, self.last = {text[0] for text in control}, {text[-1] for text in control}
        self.pattern = re.compile(_longest(sorted(control)) if control else "(?!)")

    def encode(self, text: str, marker: str) -> list[int]:
        """Return the token ids of a rendered conversation, where a marker stands in what is no control token."""
        spelled = self.pattern.sub(lambda token: self._spelled[token[0]], text)
        return [self._ids.get(i, i) for i in plain_ids(self._tokenizer, spelled.replace(marker, ""))]


def plain_ids(tokenizer: Any, text: str) -> list[int]:
    try:
        return list(tokenizer.encode(text, add_special_tokens=False).ids)
    except (TypeError, UnicodeEncodeError) as error:
        raise InputError("a message holds a lone surrogate and is not valid Unicode", "messages") from error


def _copy(tokenizer: Any, added_tokens: Sequence[AddedToken]) -> Any:
    """Return the tokenizer with other added tokens, and with the same model in memory: a vocabulary takes seconds."""
    copy: Any = Tokenizer(tokenizer.model)
    for part in ("normalizer", "pre_tokenizer", "decoder"):
        if (value := getattr(tokenizer, part)) is not None:
            setattr(copy, part, value)
    if tokenizer.truncation is not None:
        copy.enable_truncation(**tokenizer.truncation)
    if tokenizer.padding is not None:
        copy.enable_padding(**tokenizer.padding)
    copy.add_tokens(added_tokens)
    return copy


def _with_content(token: AddedToken, content: str) -> AddedToken:
    flags = {name: getattr(token, name) for name in ("single_word", "lstrip", "rstrip", "normalized", "special")}
    return AddedToken(content, **flags)


def _longest(words: Sequence[str]) -> str:
    """Return a regular expression of the longest of some sorted words: a tree, as thousands in a row are slow."""
    by_first: dict[str, list[str]] = {}
    for word in words:
        if word:
            by_first.setdefault(word[0], []).append(word[1:])
    branches = "|".join(re.escape(first) + _longest(rest) for first, rest in by_first.items())
    if not branches:
        return ""
    return f"(?:{branches})?" if "" in words else f"(?:{branches})"
