"""A process that renders one chat template for its parent, within bounds on time, memory and output.

A template comes with a model, from strangers. Jinja's sandbox keeps it from Python's internals (CVE-2024-34359 is what
happens without), but not from loops and strings without end, so it runs in a process of its own that can open no file.
The file is run as a script, with nothing imported but the standard library and jinja2, so that it starts in a tenth of
a second. Lines of JSON go both ways: first the template's source, then the variables of each rendering; the answers
hold "text" or "error". At a bound of the operating system the process ends.

The environment is that of `transformers` (transformers.utils.chat_template_utils), which templates are written for:
blocks are trimmed, `tojson` escapes no HTML, and there are `raise_exception`, `strftime_now`, loop controls and the
`generation` block.
"""

from __future__ import annotations

import json
import resource
import signal
import sys
import time
from datetime import datetime
from typing import Any

import jinja2
import jinja2.debug  # which would be imported at the first error, when no file can be opened
import jinja2.exceptions
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import jinja2.utils

MAX_CHARACTERS = 2**24  # of a rendered conversation
MAX_MESSAGE = 300  # characters of an error


class _Generation(jinja2.ext.Extension):
    """The block around what an assistant said, which only training looks at."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body).set_lineno(line)


class _Dict:
    """`dict` for templates, without the attributes of Python's type."""

    def __call__(self, *arguments: Any, **keywords: Any) -> dict[Any, Any]:
        return dict(*arguments, **keywords)

    def fromkeys(self, *arguments: Any) -> dict[Any, Any]:
        return dict.fromkeys(*arguments)


class _Namespace(jinja2.utils.Namespace):
    """`namespace` for templates, without names that Python looks up by itself."""

    def __init__(*arguments: Any, **keywords: Any) -> None:
        self, *given = arguments
        attributes = dict(*given, **keywords)
        for name in attributes:
            _check_name(name)
        jinja2.utils.Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if str(name).startswith("_"):
        raise jinja2.exceptions.SecurityError(f"the attribute {name!r} of a namespace begins with an underscore")


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def environment() -> jinja2.Environment:
    """Return the environment of chat templates."""
    made = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    made.filters["tojson"] = _tojson
    made.globals["raise_exception"] = _raise_exception
    made.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
    made.globals["dict"] = _Dict()
    made.globals["namespace"] = _Namespace
    return made


def _render(template: jinja2.Template, variables: dict[str, Any]) -> str:
    parts, length = [], 0
    for part in template.generate(variables):
        length += len(part)
        if length > MAX_CHARACTERS:
            raise jinja2.TemplateError(f"more than {MAX_CHARACTERS:,} characters")
        parts.append(part)
    return "".join(parts)


def _bounded(seconds: float, work: Any, *arguments: Any) -> dict[str, Any]:
    """Return the result of some work as "text", or its "error"; the process ends where it takes too long."""
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        return {"text": work(*arguments)}
    except Exception as error:  # whatever a template's expressions raise
        line = f"line {error.lineno}: " if isinstance(error, jinja2.TemplateSyntaxError) else ""
        return {"error": (line + (str(error) or type(error).__name__))[:MAX_MESSAGE]}
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def main() -> None:
    """Arguments: processor seconds of each answer, and bytes of address space."""
    seconds, memory = float(sys.argv[1]), int(sys.argv[2])
    made = environment()
    # Read what Python loads when it is first needed, while files can be opened.
    made.from_string("{{ 'a\\n' | trim | pprint }}").render()
    _bounded(seconds, made.from_string("{{ raise_exception('') }}").render)
    time.localtime()
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))  # standard input, output and error are open
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's
    source = json.loads(sys.stdin.buffer.readline())
    read = _bounded(seconds, made.from_string, source)
    template = read.pop("text", None)
    _answer(read)
    if template is not None:
        for line in sys.stdin.buffer:
            _answer(_bounded(seconds, _render, template, json.loads(line)))


def _answer(found: dict[str, Any]) -> None:
    sys.stdout.buffer.write(json.dumps(found).encode() + b"\n")
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
