"""Structured outputs: a row's text follows a JSON schema, a regular expression, a list of choices or a grammar.

Before each token of a row is chosen, the tokens that cannot continue such a text are excluded (Willard, Louf: Efficient
guided generation for large language models, arXiv 2307.09702). llguidance finds them.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from chameleon_deploy.errors import DependencyError, InputError
from chameleon_deploy.runtime.bounded_process import BoundedProcess

if TYPE_CHECKING:
    from llguidance import LLMatcher

MAX_CHARACTERS = 2**16  # of a schema, an expression, all choices or a grammar
KEPT = 64  # compiled grammars that are kept
CPU_SECONDS = 1.0  # of compiling one
MEMORY = 128 * 2**20  # bytes
# What Python's json.dumps writes, and models that read it. Where whitespace is free, a weak model writes nothing else.
JSON_FORM = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": ", "lenient": False,
             "coerce_one_of": False, "whitespace_pattern": None}  # fmt: skip
_MAX_MESSAGE = 300  # characters of what llguidance says


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
            value = tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else ()
            if not value or not all(isinstance(text, str) for text in value):
                raise _error("choice must be a list of at least one text")
        elif not isinstance(value, str):
            raise _error(f"{name} is a {type(value).__name__}: pass a text")
        if (length := sum(map(len, value))) > MAX_CHARACTERS:
            raise _error(f"{name} has {length:,} characters, at most {MAX_CHARACTERS:,} are taken")
        object.__setattr__(self, name, value)


class Grammars:
    """Compiles structured outputs for one tokenizer, each within bounds. Safe to use from any thread."""

    def __init__(self, tokenizer: Any, vocab_size: int, eos_token_id: int) -> None:
        """
        tokenizer     a `tokenizers.Tokenizer`
        vocab_size    of the logits
        eos_token_id  ends a text

        Raises DependencyError without llguidance, InputError for a tokenizer that it cannot read.
        """
        try:
            from chameleon_deploy.runtime import compile_process
        except ImportError as error:
            message = "structured_outputs need llguidance: pip install 'chameleon-deploy[structured]'"
            raise DependencyError(message, "structured_outputs") from error
        self._vocab_size, self._eos_token_id = vocab_size, eos_token_id
        about = tokenizer.to_str(), max(vocab_size, tokenizer.get_vocab_size()), eos_token_id
        try:
            self._tokenizer = compile_process.read_tokenizer(*about)
        except ValueError as error:
            raise _error(f"the tokenizer of this model cannot be followed: {error}") from error
        self._matcher_of = compile_process.matcher_of
        self._process = BoundedProcess(Path(compile_process.__file__), CPU_SECONDS, MEMORY, [about, JSON_FORM])
        self._kept: OrderedDict[StructuredOutputs, LLMatcher] = OrderedDict()
        self._lock, self._compiling = threading.Lock(), threading.Lock()

    def mask(self, outputs: StructuredOutputs, stop_ids: Sequence[int], ignore_eos: bool) -> TokenMask:
        """Return the state of a new row.

        stop_ids    tokens that end the row, besides the end of text
        ignore_eos  end the text only where nothing else can follow

        Raises InputError for structured outputs that cannot be compiled.
        """
        ends = [token_id for token_id in stop_ids if token_id < self._vocab_size]
        matcher = self._find(outputs) or self._compile(outputs)
        return TokenMask(matcher, self._vocab_size, self._eos_token_id, ends, ignore_eos)

    def __contains__(self, outputs: StructuredOutputs) -> bool:
        """Return whether a mask takes no time to compile."""
        return self._find(outputs) is not None

    def _find(self, outputs: StructuredOutputs) -> LLMatcher | None:
        """Return a copy of what was compiled before."""
        with self._lock:
            kept = self._kept.get(outputs)
            if kept is None:
                return None
            self._kept.move_to_end(outputs)
        matcher = kept.deep_copy()
        matcher.compute_bitmask()
        if not matcher.is_error():
            return matcher
        # Copies share the states of their expressions, and at the limit of those all fail.
        with self._lock:
            self._kept.pop(outputs, None)
        return None

    def _compile(self, outputs: StructuredOutputs) -> LLMatcher:
        (name,) = [field.name for field in fields(outputs) if getattr(outputs, field.name) is not None]
        with self._compiling:
            if (matcher := self._find(outputs)) is not None:  # by another thread
                return matcher
            answer = self._process.ask([name, getattr(outputs, name)])
            if "text" not in answer:
                raise _error(f"{name}: {answer['error']}")
            try:
                matcher = self._matcher_of(self._tokenizer, answer["text"])
            except ValueError as error:
                raise _error(f"{name}: {_shortened(str(error))}") from error
        with self._lock:
            self._kept[outputs] = matcher
            while len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        return matcher.deep_copy()


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
            raise _error(f"token {token_id} does not continue the text: {_shortened(self._matcher.get_error())}")

    def _next(self) -> npt.NDArray[np.bool_]:
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        if self._matcher.is_error():
            raise _error(_shortened(self._matcher.get_error()))
        allowed = np.unpackbits(bits, bitorder="little").view(np.bool_)
        if allowed[self._eos_token_id]:
            if self._ignore_eos:
                allowed[self._eos_token_id] = False
                allowed[self._eos_token_id] = not allowed.any()
            allowed[self._stop_ids] = True
        return allowed[: self._vocab_size]


def _shortened(message: str) -> str:
    message = message.partition("\n")[0]
    return message if len(message) <= _MAX_MESSAGE else f"{message[:_MAX_MESSAGE]}..."


def _error(message: str) -> InputError:
    return InputError(f"structured_outputs: {message}", "structured_outputs")
