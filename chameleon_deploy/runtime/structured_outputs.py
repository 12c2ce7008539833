"""Structured outputs: a row's text follows a JSON schema, a regular expression, a list of choices or a grammar.

Before each token of a row is chosen, the tokens that cannot continue such a text are excluded (Willard, Louf: Efficient
guided generation for large language models, arXiv 2307.09702). llguidance finds them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from chameleon_deploy.errors import DependencyError, InputError

if TYPE_CHECKING:
    from llguidance import LLMatcher

MAX_CHARACTERS = 2**16  # of a schema, an expression, all choices or a grammar
KEPT = 64  # compiled grammars that are kept
_MAX_MESSAGE = 300  # characters of what llguidance says
# What Python's json.dumps writes, and models that read it. Where whitespace is free, a weak model writes nothing else.
_JSON_FORM = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": ", "lenient": False,
              "coerce_one_of": False, "whitespace_pattern": None}  # fmt: skip


@dataclass(frozen=True)
class StructuredOutputs:
    """What the text of a row must be: exactly one of the fields.

    json     a JSON schema, as a mapping or as text; kept as text. Properties are written in the order of the schema,
             and the text has one form, that of Python's json.dumps
    regex    a regular expression, of Rust's crate `regex`, that the whole text matches
    choice   some texts, of which it is one
    grammar  a context-free grammar, in llguidance's variant of Lark, or in llama.cpp's GBNF

    Raises InputError for none or several of them, and for one of the wrong type or of more than 65,536 characters.
    """

    json: Mapping[str, Any] | str | None = None
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None

    def __post_init__(self) -> None:
        given = [field.name for field in fields(self) if getattr(self, field.name) is not None]
        if len(given) != 1:
            message = f"pass exactly one of json, regex, choice and grammar, got {', '.join(given) or 'none'}"
            raise _error(message)
        (name,) = given
        value = getattr(self, name)
        if name == "json" and not isinstance(value, str):
            try:
                value = json.dumps(value, ensure_ascii=False)
            except (TypeError, ValueError, RecursionError) as error:
                raise _error(f"json cannot be written as JSON: {error}") from error
        if name == "choice":
            value = () if isinstance(value, str) else tuple(value)
            if not value or not all(isinstance(text, str) for text in value):
                raise _error("choice must be a list of at least one text")
        elif not isinstance(value, str):
            raise _error(f"{name} is a {type(value).__name__}: pass a text")
        if (length := sum(map(len, value))) > MAX_CHARACTERS:
            raise _error(f"{name} has {length:,} characters, at most {MAX_CHARACTERS:,} are taken")
        object.__setattr__(self, name, value)


class Grammars:
    """Compiles structured outputs for one tokenizer. Safe to use from any thread."""

    def __init__(self, tokenizer: Any, vocab_size: int, eos_token_id: int) -> None:
        """
        tokenizer     a `tokenizers.Tokenizer`
        vocab_size    of the logits
        eos_token_id  ends a text

        Raises DependencyError without llguidance, InputError for a tokenizer that it cannot read.
        """
        try:
            import llguidance
        except ImportError as error:
            message = "structured_outputs need llguidance: pip install 'chameleon-deploy[structured]'"
            raise DependencyError(message, "structured_outputs") from error
        self._llguidance = llguidance
        size = max(vocab_size, tokenizer.get_vocab_size())
        self._vocab_size, self._eos_token_id = vocab_size, eos_token_id
        try:
            self._tokenizer = llguidance.LLTokenizer(tokenizer.to_str(), n_vocab=size, eos_token=eos_token_id)
        except ValueError as error:
            raise _error(f"the tokenizer of this model cannot be followed: {error}") from error
        self._limits = llguidance.LLParserLimits(
            max_lexer_states=20_000,  # of 1 to 2 kB each
            verbose_errors=False,
        )
        self._compiled = lru_cache(KEPT)(self._compile)

    def mask(self, outputs: StructuredOutputs, stop_ids: Sequence[int], ignore_eos: bool) -> TokenMask:
        """Return the state of a new row.

        stop_ids    tokens that end the row, besides the end of text
        ignore_eos  end the text only where nothing else can follow

        Raises InputError for structured outputs that cannot be compiled.
        """
        ends = [token_id for token_id in stop_ids if token_id < self._vocab_size]
        return TokenMask(self._compiled(outputs).deep_copy(), self._vocab_size, self._eos_token_id, ends, ignore_eos)

    def _compile(self, outputs: StructuredOutputs) -> LLMatcher:
        (name,) = [field.name for field in fields(outputs) if getattr(outputs, field.name) is not None]
        try:
            grammar = getattr(self, f"_{name}")(getattr(outputs, name))
        except (ValueError, RecursionError) as error:
            raise _error(f"{name}: {error}") from error
        matcher = self._llguidance.LLMatcher(self._tokenizer, grammar, log_level=0, limits=self._limits)
        matcher.compute_bitmask()  # the first one finds more, and copies share what it computes
        if matcher.is_error():
            raise _error(f"{name}: {_first_line(matcher)}")
        return matcher

    def _json(self, text: str) -> str:
        schema = json.loads(text)
        if isinstance(schema, bool):
            schema = {} if schema else {"not": {}}
        if not isinstance(schema, dict):
            raise ValueError("a schema must be an object")
        return json.dumps({"grammars": [{"json_schema": {**schema, "x-guidance": _JSON_FORM}}]})

    def _regex(self, text: str) -> str:
        return self._llguidance.LLMatcher.grammar_from_regex(text)

    def _choice(self, texts: Sequence[str]) -> str:
        literals = " | ".join(json.dumps(text, ensure_ascii=False) for text in texts)
        return _lark(f"start: CHOICE\nCHOICE: {literals}\n")

    def _grammar(self, text: str) -> str:
        from llguidance.gbnf_to_lark import GbnfToLarkError, any_to_lark

        try:
            return _lark(any_to_lark(text))
        except GbnfToLarkError as error:
            raise ValueError(str(error)) from error


class TokenMask:
    """The tokens that may come next in one row, where its text follows a grammar."""

    def __init__(
        self, matcher: LLMatcher, vocab_size: int, eos_token_id: int, stop_ids: Sequence[int], ignore_eos: bool
    ) -> None:
        self._matcher, self._vocab_size, self._eos_token_id = matcher, vocab_size, eos_token_id
        self._stop_ids = np.array(stop_ids, np.int64)
        self._ends = {eos_token_id, *stop_ids}
        self._ignore_eos = ignore_eos
        self._allowed: npt.NDArray[np.bool_] | None = None

    def allowed(self) -> npt.NDArray[np.bool_]:
        """Return the tokens that may come next.  -> bool [vocab]

        Where the text may end, all tokens that end the row are among them.

        Raises InputError where llguidance gives up at a limit.
        """
        if self._allowed is None:
            self._allowed = self._next()
        return self._allowed

    def append(self, token_id: int) -> None:
        """Append the row's next token. Raises InputError for one that was not allowed."""
        self._allowed = None
        if token_id not in self._ends and not self._matcher.consume_token(token_id):
            raise _error(f"token {token_id} does not continue the text: {_first_line(self._matcher)}")

    def _next(self) -> npt.NDArray[np.bool_]:
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        if self._matcher.is_error():
            raise _error(_first_line(self._matcher))
        allowed = np.unpackbits(bits, bitorder="little").view(np.bool_)
        if allowed[self._eos_token_id]:
            if self._ignore_eos:
                allowed[self._eos_token_id] = False
                allowed[self._eos_token_id] = not allowed.any()
            allowed[self._stop_ids] = True
        return allowed[: self._vocab_size]


def json_rule(schema: Mapping[str, Any]) -> str:
    """Return the body of a rule in Lark whose texts follow a JSON schema."""
    return f"%json {json.dumps({**schema, 'x-guidance': _JSON_FORM})}"


def _lark(text: str) -> str:
    return json.dumps({"grammars": [{"lark_grammar": text}]})


def _first_line(matcher: LLMatcher) -> str:
    text = matcher.get_error().partition("\n")[0]
    return text if len(text) <= _MAX_MESSAGE else f"{text[:_MAX_MESSAGE]}..."


def _error(message: str) -> InputError:
    return InputError(f"structured_outputs: {message}", "structured_outputs")
