"""Time speculative decoding by prompt lookup against plain decoding, on code, prose and summaries.

    python -m benchmarks.prompt_lookup BUNDLE TEXT --rounds 3

Three prompts: a function of Python's library, prose, and prose with the beginning of a summary that repeats it. The
lengths of drafts alternate within a round; each figure is the median of the rounds' ratios.
"""

from __future__ import annotations

import inspect
import statistics
import textwrap
import time
from pathlib import Path
from typing import Annotated

import typer

import chameleon_deploy
from chameleon_deploy import Runtime, Sampling
from chameleon_deploy.terminal import console

DRAFT_TOKENS = (0, 2, 4, 8)
NEW_TOKENS = 96


def prompts(prose: str) -> dict[str, str]:
    source = inspect.getsource(textwrap)
    start = source.index("def wrap(")
    return {
        "code": source[start : start + 900],
        "prose": prose[:600],
        "summary": f"{prose[:600]}\n\nIn short: {prose[:80]}",
    }


def seconds(runtime: Runtime, prompt: str, sampling: Sampling, draft_tokens: int) -> tuple[float, list[int]]:
    start = time.perf_counter()
    generation = runtime.generate(
        [prompt], max_new_tokens=NEW_TOKENS, sampling=sampling, prompt_lookup_num_tokens=draft_tokens
    )[0]
    return time.perf_counter() - start, generation.token_ids


def main(
    bundle: Annotated[Path, typer.Argument(help="Bundle directory.")],
    text: Annotated[Path, typer.Argument(help="A file of prose.")],
    rounds: Annotated[int, typer.Option(min=1, help="Samples of each length of drafts.")] = 3,
    threads: Annotated[int, typer.Option(min=1, help="Threads.")] = 2,
) -> None:
    """Time drafts of several lengths against plain decoding, greedy and sampled."""
    prose = text.read_text(encoding="utf-8")
    runtime = chameleon_deploy.load(bundle, threads=threads, mode="none")
    print("text     sampling     draft  time/plain  equal tokens")
    for name, prompt in prompts(prose).items():
        for label, sampling in (
            ("greedy", Sampling(ignore_eos=True)),
            ("T = 0.7", Sampling(temperature=0.7, seed=1, ignore_eos=True)),
        ):
            samples = [[seconds(runtime, prompt, sampling, n) for n in DRAFT_TOKENS] for _ in range(rounds)]
            plain_ids = samples[0][0][1]
            for i, draft_tokens in enumerate(DRAFT_TOKENS[1:], 1):
                ratio = statistics.median(round_[i][0] / round_[0][0] for round_ in samples)
                equal = sum(a == b for a, b in zip(plain_ids, samples[0][i][1], strict=True))
                print(f"{name:8s} {label:12s} {draft_tokens:5d}  {ratio:10.2f}  {equal}/{len(plain_ids)}")


if __name__ == "__main__":
    console.run(main)
