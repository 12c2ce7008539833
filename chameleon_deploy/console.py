"""What all commands share: how they start, how they fail, how they print."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn, cast

from chameleon_deploy.commands import OPTION_GROUPS
from chameleon_deploy.errors import ChameleonError

try:
    import typer
    from rich.console import Console
    from rich.markup import escape
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
stdout = Console(highlight=False, width=None if sys.stdout and sys.stdout.isatty() else 160)
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


# Of every typer.Typer.
SETTINGS: dict[str, Any] = {
    "add_completion": False,
    "context_settings": {"help_option_names": ["-h", "--help"]},
    "pretty_exceptions_enable": False,
    "rich_markup_mode": "rich",
}


def make_command(command: Callable[..., Any] | typer.Typer) -> Any:
    """A function, or an app of several, as a click command whose --help is grouped by OPTION_GROUPS."""
    if isinstance(command, typer.Typer):
        app = command
    else:
        app = typer.Typer(**SETTINGS)
        app.command()(command)
    made: Any = typer.main.get_command(app)
    for each in (made, *getattr(made, "commands", {}).values()):
        each.help = escape(each.help or "")
        for option in each.params:
            option.help = escape(getattr(option, "help", None) or "")
            option.rich_help_panel = option.rich_help_panel or _GROUPS.get(option.name)
    return made


_GROUPS = {name: group for group, names in OPTION_GROUPS.items() for name in names}


def run(command: Callable[..., Any] | typer.Typer) -> NoReturn:
    """Run one function, or an app of several, as a program."""
    run_command(make_command(command))


def run_command(command: Any) -> NoReturn:
    """Run a click command. Exit codes: 0 done, 1 a check failed, 2 bad usage or bad input with one line on
    standard error."""
    _check_streams()
    try:
        result = command(standalone_mode=False)
        sys.stdout.flush()  # here, where a full disk or a reader that has gone is noticed
    except ChameleonError as error:
        _exit(f"error: {error} [{error.code}]", 2)
    except CheckFailedError as error:
        _exit(f"failed: {error}", 1)
    except ClickException as error:
        _exit(f"error: {cast(Any, error).format_message()} (--help lists the options) [usage]", 2)
    except (KeyboardInterrupt, typer.Abort):
        _exit("interrupted", 130)
    except BrokenPipeError:
        _stop_writing()
    except SystemExit as end:
        if isinstance(end.__context__, BrokenPipeError):  # typer's exit code for it is 1: a check failed
            _stop_writing()
        raise
    except OSError as error:
        _exit(f"error: {error.filename or 'input or output'}: {error.strerror or error} [output_failed]", 2)
    sys.exit(result if isinstance(result, int) else 0)


def _stop_writing() -> NoReturn:
    """The reader has gone, which is no fault: nothing more is written, and the exit code is 0."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is flushed at the end
    sys.exit(0)


def _check_streams() -> None:
    """Standard output must be open, since else the first file that is opened takes its place. Text that it cannot
    encode is escaped."""
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115, PTH123
    if sys.stdout is None:
        _exit("error: standard output is closed: redirect it to a file or to /dev/null [output_failed]", 2)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def _exit(line: str, code: int) -> NoReturn:
    print(" ".join(line.split()), file=sys.stderr)
    sys.exit(code)
