"""`benchmarks.shared_prefix`: every engine has the same texts, and a short answer is no figure."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import httpx
import pytest

from benchmarks.shared_prefix import Answering, measure, over_http
from chameleon_deploy.errors import CheckFailedError
from tests.commands import call
from tests.serving import running


def test_engines_have_the_same_texts_in_turns() -> None:
    asked = dict[str, list[list[list[int]]]](a=[], b=[])
    order = list[str]()

    def engine(name: str, prompts: Sequence[Sequence[int]]) -> None:
        asked[name].append([list(prompt) for prompt in prompts])
        order.append(name)

    engines: dict[str, Answering] = {name: lambda prompts, *_, name=name: engine(name, prompts) for name in asked}
    found = measure(engines, rounds=2, clients=3, each=2, prefix_tokens=5, new_tokens=1)
    assert asked["a"] == asked["b"]
    assert "".join(order) == "abbaab"
    assert {name: len(rates) for name, rates in found.items()} == {"a": 2, "b": 2}
    for prompts in asked["a"]:
        assert len(prompts) == 6
        assert len({tuple(prompt[:5]) for prompt in prompts}) == 1
        assert len({tuple(prompt) for prompt in prompts}) == 6
    assert len({tuple(prompts[0][:5]) for prompts in asked["a"]}) == 3


def test_a_short_answer_is_no_figure(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with running(bundle, mode="none") as server:
        answer = over_http(server.url)
        answer([[1, 2, 3]], 4, 1)
        post = httpx.Client.post
        monkeypatch.setattr(
            httpx.Client,
            "post",
            lambda client, url, json: post(client, url, json={**json, "max_tokens": json["max_tokens"] - 1}),
        )
        with pytest.raises(CheckFailedError, match="answered 3 tokens, not 4"):
            answer([[1, 2, 3]], 4, 1)


def test_the_command(bundle: Path) -> None:
    sizes = ["--rounds", 1, "--clients", 2, "--each", 1, "--threads", 1, "--prefix-tokens", 33, "--new-tokens", 2]
    result = call("benchmarks.shared_prefix", "--bundle", f"one={bundle}", "--bundle", f"two={bundle}", *sizes)
    assert result.returncode == 0, result.stderr
    for name in ("one", "two"):
        assert re.search(rf"{name}\W+[\d.]+\W+[\d.]+ \(", result.stdout), result.stdout


@pytest.mark.parametrize(("words", "said"), [([], "nothing to ask"), (["--convert", "x"], "--convert needs --out")])
def test_what_cannot_be_asked(words: list[str], said: str) -> None:
    result = call("benchmarks.shared_prefix", *words)
    assert (result.returncode, said in result.stderr) == (2, True)
