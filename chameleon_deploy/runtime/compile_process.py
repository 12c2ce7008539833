"""A process that compiles structured outputs for its parent, within bounds on time and memory.

They come from whoever sends a request. llguidance bounds most of what one may cost, but not how deep rules or
references lead, which ends a process at the end of its stack, nor the time of every combination of keywords. So this
process compiles each first, with a smaller stack than its parent's.

The file is run as a script, see bounded_process.py. The first line is the tokenizer, [its JSON, the number of tokens,
the end of text], and the form of JSON; the others are a field of StructuredOutputs and its value. The answers hold
"text", the grammar that the parent compiles, or "error".
"""

from __future__ import annotations

import json
import resource
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import llguidance
import llguidance.gbnf_to_lark

MAX_MESSAGE = 300  # characters of an error
STACK = 2**20  # bytes; threads of the parent have at least twice as much


def read_tokenizer(text: str, size: int, eos_token_id: int) -> llguidance.LLTokenizer:
    """Raises ValueError."""
    return llguidance.LLTokenizer(text, n_vocab=size, eos_token=eos_token_id)


def matcher_of(tokenizer: llguidance.LLTokenizer, grammar: str) -> llguidance.LLMatcher:
    """Raises ValueError for a grammar that cannot be compiled."""
    limits = llguidance.LLParserLimits(max_lexer_states=20_000, verbose_errors=False)  # of 1 to 2 kB each
    matcher = llguidance.LLMatcher(tokenizer, grammar, log_level=0, limits=limits)
    matcher.compute_bitmask()  # the first one finds more, and copies share what it computes
    if matcher.is_error():
        raise ValueError(matcher.get_error().partition("\n")[0])
    return matcher


def grammar_of(field: str, value: Any, json_form: Any) -> str:
    """Return structured outputs as a grammar of llguidance. Raises ValueError or RecursionError."""
    if field == "regex":
        return llguidance.LLMatcher.grammar_from_regex(value)
    if field == "json":
        schema = json.loads(value)
        if not isinstance(schema, dict):
            raise ValueError("a schema must be an object")
        return json.dumps({"grammars": [{"json_schema": {**schema, "x-guidance": json_form}}]})
    if field == "choice":
        lark = "start: CHOICE\nCHOICE: " + " | ".join(json.dumps(text, ensure_ascii=False) for text in value)
    else:
        try:
            lark = llguidance.gbnf_to_lark.any_to_lark(value)
        except llguidance.gbnf_to_lark.GbnfToLarkError as error:
            raise ValueError(str(error)) from error
    return json.dumps({"grammars": [{"lark_grammar": lark}]})


def _compile(tokenizer: llguidance.LLTokenizer, json_form: Any, field: str, value: Any) -> str:
    grammar = grammar_of(field, value, json_form)
    matcher_of(tokenizer, grammar)
    return grammar


def _bounded(seconds: float, work: Callable[[], str]) -> dict[str, str]:
    """Return the result of some work as "text", or its "error"; the process ends where it takes too much."""
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        return {"text": work()}
    except (ValueError, RecursionError) as error:
        return {"error": str(error)[:MAX_MESSAGE]}
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def main() -> None:
    """Arguments: processor seconds of each answer, and bytes of memory beside the tokenizer."""
    seconds, memory = float(sys.argv[1]), int(sys.argv[2])
    about, json_form = json.loads(sys.stdin.buffer.readline())
    tokenizer = read_tokenizer(*about)
    limit = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + memory
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))  # standard input, output and error are open
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's
    resource.setrlimit(resource.RLIMIT_STACK, (STACK, STACK))
    _answer({"text": ""})
    for line in sys.stdin.buffer:
        _answer(_bounded(seconds, partial(_compile, tokenizer, json_form, *json.loads(line))))


def _answer(found: dict[str, str]) -> None:
    sys.stdout.buffer.write(json.dumps(found).encode() + b"\n")
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
