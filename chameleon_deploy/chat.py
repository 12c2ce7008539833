"""`python -m chameleon_deploy.chat`: a conversation with a bundle, in the terminal."""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

import chameleon_deploy
from chameleon_deploy.contract.bundle import Mode
from chameleon_deploy.errors import ChameleonError
from chameleon_deploy.runtime import Generate, Runtime, Sampling
from chameleon_deploy.runtime.chat.template import MAX_NEW_TOKENS, chat_prompt
from chameleon_deploy.terminal import console
from chameleon_deploy.terminal.adapter_options import LoadedAdapters, paths_by_name

with contextlib.suppress(ImportError):
    import readline  # noqa: F401  (lets a line be edited)

HELP = "/clear begins again, /undo takes the last turn back, /exit or Ctrl-D ends; Ctrl-C stops an answer."


def main(
    bundle: console.BundleArgument,
    system: Annotated[str | None, typer.Option(help="System prompt.")] = None,
    mode: Annotated[Mode | None, typer.Option(help="Adaptation mode.")] = None,
    adapter: Annotated[str | None, typer.Option(help="Answer with the adapter of this name.")] = None,
    load_adapter: LoadedAdapters = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Of an answer.")] = MAX_NEW_TOKENS,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.7,
    top_k: Annotated[int, typer.Option(help="0 keeps all.")] = 0,
    top_p: Annotated[float, typer.Option(help="1 keeps all.")] = 0.9,
    seed: Annotated[int, typer.Option(help="Of the first answer; the next has the next.")] = 0,
    threads: Annotated[int | None, typer.Option(min=1, help="Of ONNX Runtime.")] = None,
    provider: Annotated[str, typer.Option(help="cpu, cuda, tensorrt or auto.")] = "cpu",
    trusted_key: Annotated[
        list[Path] | None, typer.Option(help="Refuse a bundle that this Ed25519 public key (PEM) did not sign.")
    ] = None,
) -> None:
    """Chat with a bundle. Ctrl-C stops an answer, which stays in the history; at the prompt it ends the program."""
    sampling = Sampling(temperature, top_k, top_p, seed=seed)
    path = console.bundle_path(bundle)
    runtime = chameleon_deploy.load(path, provider=provider, mode=mode, threads=threads, trusted_keys=trusted_key)
    console.tell_provider(provider, runtime.provider)
    for name, source in paths_by_name(load_adapter).items():
        runtime.load_adapter(name, source)
    _ = runtime.chat_template  # a bundle without one is known before anything is typed
    chat = Chat(runtime, system, max_new_tokens, sampling, adapter)
    console.stderr.print(HELP, style="dim")
    while (line := _read()) is not None:
        match line.strip():
            case "":
                continue
            case "/exit":
                return
            case "/clear":
                chat.clear()
            case "/undo":
                chat.undo()
            case _:
                _answer(chat, line)


class Chat:
    """A conversation that grows: each answer is heard with all turns before it."""

    def __init__(
        self, runtime: Runtime, system: str | None, max_new_tokens: int, sampling: Sampling, adapter: str | None
    ) -> None:
        self._runtime, self._max_new_tokens, self._sampling = runtime, max_new_tokens, sampling
        self._adapters = None if adapter is None else [adapter]
        self._begin: list[dict[str, Any]] = [] if system is None else [{"role": "system", "content": system}]
        self._turns: list[dict[str, Any]] = []

    def clear(self) -> None:
        self._turns = []

    def undo(self) -> None:
        """Forget the last question and its answer."""
        del self._turns[-2:]

    def answer(self, text: str) -> Generator[str, None, None]:
        """Yield the parts of an answer. What was yielded is kept, also where the caller closes it before its end.

        Raises the errors of `Runtime.chat`; then the question is forgotten.
        """
        question = {"role": "user", "content": text}
        messages = [*self._begin, *self._turns, question]
        ids, generate = chat_prompt(self._runtime.chat_template, messages, self._next_options())
        tokens = self._runtime.stream([ids], generate, adapters=self._adapters)
        self._turns.append(question)
        parts: list[str] = []
        try:
            for token in tokens:
                parts.append(token.text)
                yield token.text
        finally:
            self._turns.append({"role": "assistant", "content": "".join(parts)})

    def _next_options(self) -> Generate:
        """Return the options of the next answer: another seed, so that no two have the same random numbers."""
        sampling = replace(self._sampling, seed=self._sampling.seed + len(self._turns) // 2)
        return Generate(self._max_new_tokens, sampling)


def _read() -> str | None:
    """Return a line, or None at the end."""
    try:
        return console.stderr.input("[bold]> [/bold]")
    except (EOFError, KeyboardInterrupt):
        console.stderr.print()
        return None


def _answer(chat: Chat, line: str) -> None:
    parts = chat.answer(line)
    try:
        for part in parts:
            print(part, end="", flush=True)
        print()
    except KeyboardInterrupt:
        parts.close()
        print()
        console.stderr.print("stopped", style="dim")
    except ChameleonError as error:  # of this question: a conversation longer than the model reads, for one
        console.stderr.print(str(error), style="red")


if __name__ == "__main__":
    console.run(main)
