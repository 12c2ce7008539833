"""`benchmarks.humaneval`: planted answers are judged rightly, and transformers answers as it would alone."""

from __future__ import annotations

import gzip
import shutil
from pathlib import Path

import msgspec
import pytest
import torch

from benchmarks import humaneval
from benchmarks.humaneval import Problem, Record, Solution, Transformers, code_of, load_problems, read, tables
from chameleon_deploy import Conversation
from chameleon_deploy.errors import CheckFailedError, InputError
from chameleon_deploy.export.exporter import export_bundle
from chameleon_deploy.reference.adapters import load_adapted
from chameleon_deploy.reference.checkpoint import Checkpoint
from chameleon_deploy.reference.model import Trunk
from tests.commands import call
from tests.serving import running
from tests.speaking_model import chat_source, prompt_for, speaking_bundle

TEST = "def check(candidate):\n    assert candidate() == 1\n"
RIGHT = "Here it is:\n```python\ndef one():\n    return 1\n```\nIt gives 1."
WRONG = "```\ndef one():\n    return 2\n```"
OPEN = "```python\ndef one(): return 1"  # cut by the limit of tokens


def problem(text: str = "", name: str = "one") -> Problem:
    return Problem(name, f'def one():\n    """{text}"""\n', "one", "    return 1\n", TEST)


def write(file: Path, *problems: Problem) -> Path:
    file.write_bytes(gzip.compress(b"\n".join(map(msgspec.json.encode, problems))))
    return file


@pytest.mark.parametrize(
    ("answer", "outcome"),
    [(RIGHT, "passed"), (WRONG, "failed"), ("def one(): return 1", "passed"), (OPEN, "passed"),
     ("I cannot.", "failed"), ("", "failed"), ("```python\nimport sys\nsys.exit(0)\n```", "failed")],
)  # fmt: skip
def test_an_answer_passes_if_its_function_does(answer: str, outcome: str) -> None:
    assert problem().outcome(code_of(answer)) == outcome


def test_a_helper_of_the_prompt_is_there() -> None:
    with_helper = Problem("x", "def two():\n    return 2\n\n\ndef one():\n    '''1'''\n", "one", "", TEST)
    assert with_helper.outcome("def one():\n    return two() - 1") == "passed"


def test_what_is_no_file_of_problems(tmp_path: Path) -> None:
    for content in (b"x", gzip.compress(b"{}")):
        (tmp_path / "file").write_bytes(content)
        with pytest.raises(InputError):
            load_problems(tmp_path / "file")
    broken = Problem("broken", "def one():\n    ''\n", "one", "    return 3\n", TEST)
    with pytest.raises(CheckFailedError, match="broken"):
        humaneval.check_problems([problem(), broken])


def test_the_command(mini: Checkpoint, tmp_path: Path) -> None:
    """A model that says one right and one wrong program, served by the command and by a server that runs."""
    speaking_bundle([RIGHT, WRONG], mini.trunk.tokenizer, tmp_path / "bundle", chat_source())
    with running(tmp_path / "bundle", mode="none") as server:
        template = server.runtime.chat_template

        def length(text: str) -> int:
            return len(template.encode(Conversation(problem(text).messages)))

        asked = [problem(prompt_for(answer, length), str(answer)) for answer in (0, 1)]
        file = write(tmp_path / "problems.gz", asked[0], problem(), asked[1])
        options = [tmp_path / "work", "--problems", file, "--every", 2, "--threads", 1, "--max-tokens", 100]
        result = call("benchmarks.humaneval", *options, "--bundle", f"ours={tmp_path / 'bundle'}",
                      "--server", f"other={server.url}")  # fmt: skip
        assert result.returncode == 0, result.stderr
        assert result.stdout.count("1 of 2") == 2
        found = {name: msgspec.json.decode((tmp_path / "work" / f"{name}.json").read_bytes(), type=Record)
                 for name in ("ours", "other")}  # fmt: skip
        for record in found.values():
            assert [(each.text, each.outcome) for each in record.solutions] == [(RIGHT, "passed"), (WRONG, "failed")]
            assert record.seconds and all(len(each.token_ids) == each.new_tokens for each in record.solutions)
        ids = template.encode(Conversation(asked[0].messages))
        assert found["ours"].solutions[0].prompt_ids == ids
        encode = server.runtime.tokenizer.encode
        prompt, rest = (encode(text).ids for text in (asked[0].prompt, asked[0].canonical_solution))
        logprobs = server.runtime.score([prompt + rest], mode="centroid")[0].token_logprobs[-len(rest) :]
        assert found["ours"].solutions[0].logprob == pytest.approx(sum(logprobs), abs=1e-4)
        assert found["other"].mean_logprob is None
    again = call("benchmarks.humaneval", *options, "--server", "other=http://127.0.0.1:9")  # the server has ended
    assert again.returncode == 0 and "1 of 2" in again.stdout
    other = call("benchmarks.humaneval", *options, "--every", 1, "--server", "other=http://127.0.0.1:9")
    assert (other.returncode, "other problems" in other.stderr) == (2, True)
    assert call("benchmarks.humaneval", *options).returncode == 2
    assert call("benchmarks.humaneval", *options, "--bundle", "nameless").returncode == 2


def test_transformers_answers_as_it_would_alone(mini: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the drafts say: its own words, others, or the beginning of its own."""
    monkeypatch.setattr(humaneval, "PIECE", 3)
    trunk, limit = mini.trunk, 8
    prompt = trunk.tokenizer.encode("def one").ids
    alone = _greedy(trunk, prompt, limit)
    drafts = [alone, alone[:3], [*alone[:2], (alone[2] + 1) % 500, 7], [(alone[0] + 1) % 500]]
    solutions = [Solution("one", "", len(ids), prompt_ids=prompt, token_ids=ids) for ids in drafts]
    record = read(Transformers(trunk), trunk, [problem()] * len(drafts), solutions, limit)
    found = [each.token_ids for each in record.solutions]
    assert found[0] == alone and found[1] == alone[:3]
    for ids, draft in zip(found[2:], drafts[2:], strict=True):  # the last token of a draft ends an answer
        ends = [i for i, token_id in enumerate(alone) if token_id in (draft[-1], trunk.eos_token_id)]
        assert ids == alone[: ends[0] + 1 if ends else limit]
    assert "differs from the first bundle's in 2 answers" in record.notes
    assert all(each.logprob == pytest.approx(record.solutions[0].logprob) for each in record.solutions)


@torch.inference_mode()
def _greedy(trunk: Trunk, prompt: list[int], count: int) -> list[int]:
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(trunk.causal_lm(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def test_the_reference_beside_its_bundle(mini_path: Path, tmp_path: Path) -> None:
    base = shutil.copytree(mini_path / "base", tmp_path / "base")
    (base / "chat_template.jinja").write_text(chat_source())
    export_bundle(load_adapted(str(base), {}), tmp_path / "bundle")
    file = write(tmp_path / "problems.gz", problem())
    options = [tmp_path / "work", "--problems", file, "--max-tokens", 6, "--threads", 1, "--capacity", 128]
    readers = ["--reference", base, "--openvino", f"fp32={base}"]
    result = call("benchmarks.humaneval", *options, "--bundle", f"ours={tmp_path / 'bundle'}", *readers)
    assert result.returncode == 0, result.stderr
    ours, *others = (
        msgspec.json.decode((tmp_path / "work" / f"{name}.json").read_bytes(), type=Record)
        for name in ("ours", "transformers", "OpenVINO fp32")
    )
    for theirs in others:
        assert "in 0 answers" in theirs.notes
        assert ours.solutions[0].token_ids == theirs.solutions[0].token_ids
        assert ours.solutions[0].text == theirs.solutions[0].text
        assert ours.mean_logprob == pytest.approx(theirs.mean_logprob, rel=1e-4)
    assert call("benchmarks.humaneval", *options, *readers).returncode == 2  # whose answers would they read?


def test_what_is_lost_and_gained_is_listed() -> None:
    def record(name: str, outcomes: str) -> Record:
        solutions = [Solution(str(i), "", 3, "passed" if each == "+" else "failed") for i, each in enumerate(outcomes)]
        return Record(name, solutions, 8, 2.0, {})

    figures, changes = tables([record("a", "++--"), record("b", "-+-+")])
    assert len(tables([record("a", "++--")])) == 1
    assert figures.rows[1][:5] == ["b", "2 of 4", "50.0", "6.0", "2"]
    assert changes.rows == [["b", "4", "0", "3", "-"]]
