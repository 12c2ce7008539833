"""`chameleon-deploy COMMAND`: all commands as one program.

A command's module is imported when that command runs, so that `chameleon-deploy generate` works where only the runtime
is installed.
"""

from __future__ import annotations

import importlib
from typing import Annotated, Any, NoReturn

from chameleon_deploy import __version__
from chameleon_deploy.terminal import console
from chameleon_deploy.terminal.commands import COMMANDS, module_of

# console says what to install if typer is missing
import typer  # isort: skip
from typer.core import TyperCommand  # isort: skip


class _LazyCommand(TyperCommand):
    """A command known by its name and help line; its module is imported to parse the arguments."""

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        return load(str(self.name)).make_context(info_name, args, parent, **extra)


def main() -> NoReturn:
    console.run_command(build())


def build() -> Any:
    """Return the program as a click group."""
    app = typer.Typer(**{**console.SETTINGS, "add_completion": True})
    app.callback(invoke_without_command=True, help="Train, export, verify and run ChameleonLLM bundles.")(_root)
    group: Any = typer.main.get_command(app)
    for name, line in COMMANDS.items():
        group.add_command(_LazyCommand(name, help=line, rich_markup_mode=None))
    return group


def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.", is_eager=True)] = False,
) -> None:
    if version:
        print(f"chameleon-deploy {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help())


def load(name: str) -> Any:
    """Return a command by its name. Its module is imported."""
    module = importlib.import_module(module_of(name))
    if hasattr(module, "__path__"):  # a package's command is its __main__
        module = importlib.import_module(f"{module.__name__}.__main__")
    return console.make_command(getattr(module, "app", None) or module.main)


if __name__ == "__main__":
    main()
