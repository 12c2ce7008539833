"""Start, progress, output and exit codes of all commands."""

from __future__ import annotations

import io
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NoReturn, cast

from chameleon_deploy.directory import write_whole
from chameleon_deploy.errors import ChameleonError, CheckFailedError, OutputError
from chameleon_deploy.store import remote
from chameleon_deploy.terminal.commands import OPTION_GROUPS
from chameleon_deploy.terminal.progress import Progress
from chameleon_deploy.terminal.table import UNLIMITED, Sheet

try:
    import typer
    from rich import progress as bars
    from rich.console import Console
    from rich.markup import escape
except ImportError:
    sys.exit("error: the command line needs typer: pip install 'chameleon-deploy[cpu]'")

# typer uses click or, in newer releases, a vendored copy of it: this name is right for both.
ClickException = cast(type[Exception], typer.BadParameter.__mro__[2])

# Without markup, since brackets in paths, extras and texts are literal. A pipe has no width.
stdout = Console(highlight=False, markup=False, width=None if sys.stdout and sys.stdout.isatty() else UNLIMITED)
stderr = Console(highlight=False, markup=False, stderr=True)


def show(*sheets: Sheet, to: Console = stdout) -> None:
    """Print tables in the width of the terminal."""
    for sheet in sheets:
        for table in sheet.to_rich(to.width):
            to.print(table)


def check_output(*files: Path | None) -> None:
    """Check before the work starts that the command's output files can be written; None is ignored.

    Raises OutputError.
    """
    for file in files:
        if file is None or (file.exists() and not file.is_file() and not file.is_dir()):
            continue  # a device or a pipe
        if file.is_dir():
            raise OutputError(f"{file} is a directory: pass the name of a file")
        try:
            with tempfile.TemporaryFile(dir=file.parent):
                pass
        except OSError as error:
            raise OutputError(f"cannot write {file}: {file.parent}: {error.strerror}") from error


def write_json(value: Any, file: Path) -> None:
    """Write a JSON record. The file appears whole or not at all. Raises OutputError."""
    write_whole(file, lambda partial: partial.write_text(json.dumps(value, indent=2) + "\n"))


def tell_provider(asked: str, taken: str) -> None:
    """Print on standard error which provider `auto` selected."""
    if asked == "auto":
        print(f"provider: {taken}", file=sys.stderr)


@contextmanager
def progress() -> Iterator[Progress]:
    """Draw progress bars on standard error, one for each kind of work.

    Nothing is drawn if standard error is not a terminal.
    """
    columns = (
        bars.SpinnerColumn(),
        bars.TextColumn("{task.description}", markup=False),
        bars.BarColumn(),
        bars.MofNCompleteColumn(),
        bars.TimeElapsedColumn(),
        bars.TimeRemainingColumn(),
    )
    with bars.Progress(*columns, console=stderr, transient=True, disable=not stderr.is_terminal) as drawn:
        tasks: dict[str, bars.TaskID] = {}

        def report(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = drawn.add_task(what, total=total)
            drawn.update(tasks[what], completed=done, total=total)

        yield report


BundleArgument = Annotated[
    str, typer.Argument(help="Bundle directory, or the URL of one: s3://, gs://, hf:// or https://.")
]


def bundle_path(bundle: str) -> Path:
    """Return the directory of a BundleArgument; one in object storage is downloaded. Raises a ChameleonError."""
    with progress() as report:
        return remote.local(bundle, report)


# The arguments of every typer.Typer.
SETTINGS: dict[str, Any] = {
    "add_completion": False,
    "context_settings": {"help_option_names": ["-h", "--help"]},
    "pretty_exceptions_enable": False,
    "rich_markup_mode": "rich",
}


def make_command(command: Callable[..., Any] | typer.Typer) -> Any:
    """Return a function or an app with several commands as a click command; OPTION_GROUPS group its --help."""
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
    """Run one function, or an app with several commands, as a program."""
    run_command(make_command(command))


def run_command(command: Any) -> NoReturn:
    """Run a click command.

    Exit codes: 0 done, 1 a check failed, 2 bad usage or bad input with one line on standard error.
    """
    _check_streams()
    try:
        result = command(standalone_mode=False)
        sys.stdout.flush()  # flush here, so that a full disk or a closed pipe is noticed
    except ChameleonError as error:
        _exit(f"error: {error} [{error.code}]", 2)
    except ModuleNotFoundError as error:  # a missing optional package raises DependencyError, which says more
        if str(error.name).startswith("chameleon_deploy"):
            raise
        _exit(f"error: {error.name} is missing: pip install 'chameleon-deploy[export]' [dependency_missing]", 2)
    except CheckFailedError as error:
        _exit(f"failed: {error}", 1)
    except ClickException as error:
        _exit(f"error: {cast(Any, error).format_message()} (--help lists the options) [usage]", 2)
    except (KeyboardInterrupt, typer.Abort):
        _exit("interrupted", 130)
    except BrokenPipeError:
        _stop_writing()
    except SystemExit as end:
        if isinstance(end.__context__, BrokenPipeError):  # typer exits with 1, which means that a check failed
            _stop_writing()
        raise
    except OSError as error:
        _exit(f"error: {error.filename or 'input or output'}: {error.strerror or error} [output_failed]", 2)
    sys.exit(result if isinstance(result, int) else 0)


def _stop_writing() -> NoReturn:
    """Exit with code 0 after the reader closed the pipe, which is no fault. Nothing more is written."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is flushed at exit
    sys.exit(0)


def _check_streams() -> None:
    """Require an open standard output; otherwise the first file that is opened would get its descriptor.

    Text that the output cannot encode is escaped.
    """
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115, PTH123
    if sys.stdout is None:
        _exit("error: standard output is closed: redirect it to a file or to /dev/null [output_failed]", 2)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def _exit(line: str, code: int) -> NoReturn:
    print(" ".join(line.split()), file=sys.stderr)
    sys.exit(code)
