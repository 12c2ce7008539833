"""What all commands share: how they start, how they fail, how they print."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn, cast

from chameleon_deploy.errors import ChameleonError

try:
    import typer
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        SpinnerColumn,
        TaskID,
        TextColumn,
        TimeElapsedColumn,
    )
    from rich.text import Text
except ImportError:
    sys.exit("error: the command line needs typer: pip install 'chameleon-deploy[cpu]'")

# typer uses click, or in newer releases a copy inside itself: this name is right for both.
ClickException = cast(type[Exception], typer.BadParameter.__mro__[2])

# A pipe has no width: tables then take what they need.
stdout = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
stderr = Console(stderr=True, highlight=False)


class CheckFailedError(Exception):
    """The command did its work and the answer is no: exit code 1."""


def plain(text: str) -> Text:
    """A model's text as it is: no markup, control characters made visible."""
    return Text("".join(c if c == "\n" or c.isprintable() else "\ufffd" for c in text.expandtabs(4)))


def tell_provider(asked: str, taken: str) -> None:
    """On standard error, what provider `auto` has taken."""
    if asked == "auto":
        print(f"provider: {taken}", file=sys.stderr)


@contextmanager
def progress() -> Iterator[Callable[[str, int, int], None]]:
    """Bars on standard error, one for each kind of work: call it with (what, done, total).

    Nothing is drawn when standard error is not a terminal.
    """
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=stderr, transient=True, disable=not stderr.is_terminal) as bars:
        tasks: dict[str, TaskID] = {}

        def report(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], completed=done, total=total)

        yield report


def run(command: Callable[..., Any]) -> NoReturn:
    """Run one function as a program."""
    app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    app.command()(command)
    run_app(app)


def run_app(app: typer.Typer) -> NoReturn:
    """Exit codes: 0 done, 1 a check failed, 2 bad usage or bad input with one line on standard error."""
    try:
        result = app(standalone_mode=False)
    except ChameleonError as error:
        _exit(f"error: {error} [{error.code}]", 2)
    except CheckFailedError as error:
        _exit(f"failed: {error}", 1)
    except ClickException as error:
        _exit(f"error: {cast(Any, error).format_message()} (--help lists the options) [usage]", 2)
    except (KeyboardInterrupt, typer.Abort):
        _exit("interrupted", 130)
    except BrokenPipeError:
        sys.stderr.close()  # the reader has gone: that is no fault of ours
        sys.exit(0)
    except OSError as error:
        _exit(f"error: {error.filename or 'input or output'}: {error.strerror or error} [output_failed]", 2)
    sys.exit(result if isinstance(result, int) else 0)


def _exit(line: str, code: int) -> NoReturn:
    print(" ".join(line.split()), file=sys.stderr)
    sys.exit(code)
