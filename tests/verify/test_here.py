"""`verify --here`: a right machine gives the recorded answers; one that saturates, or any other wrong one, does not."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import chameleon_deploy
from chameleon_deploy import Runtime
from chameleon_deploy.contract.bundle import Precision, open_bundle
from chameleon_deploy.errors import ManifestError, NumericError
from chameleon_deploy.export.exporter import export_bundle
from chameleon_deploy.reference.adapters import load_adapted
from chameleon_deploy.runtime.decode.logits import HostLogits
from chameleon_deploy.runtime.known_answers import FIELD, PARITY, adapt_rows, known_answers, recorded_answers
from chameleon_deploy.verify import here
from chameleon_deploy.verify.here import known_answer_checks
from tests.adapters import LLAMA_LAYERS, save_adapter
from tests.commands import run
from tests.conftest import Exported
from tests.damage import reseal
from tests.devices import on_cpu, with_sessions
from tests.fake_cuda import FakeCudart
from tests.saturation import plant_saturation
from tests.serving import running
from tests.shared_data import good_bundle

Copy = Callable[[Path], Path]


def missed(runtime: Runtime) -> set[str]:
    checks = known_answer_checks(runtime)
    assert {check.graph for check in checks} == {runtime.graph}
    return {check.name.removeprefix("known answers: ") for check in checks if not check.passed}


@pytest.fixture
def int8_bundle(exported: Exported) -> Path:
    return exported("llama", "int8")


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_this_machine_gives_its_own_answers(precision: Precision, exported: Exported) -> None:
    """In every mode that needs no factors of a caller, on the graph that recorded them and on the portable one."""
    bundle = open_bundle(exported("llama", precision))
    answers = recorded_answers(bundle)
    assert list(answers.modes) == ["none", "centroid", "request", "cohort", "tenant"]
    assert bool(answers.hidden_states) == (precision != "bf16")  # whose decoder returns none
    assert missed(on_cpu(bundle)) == set()
    if precision != "bf16":
        assert answers.graph == "decoder_cpu"
        assert missed(on_cpu(bundle, "decoder")) == set()
        assert missed(with_sessions(bundle, FakeCudart())) == set()


def test_adapters_and_texts_without_tokens(llama_path: Path, tmp_path: Path) -> None:
    base = llama_path / "base"
    adapter = save_adapter(base, tmp_path / "peft", 1, r=4, lora_alpha=12, target_modules=LLAMA_LAYERS)
    export_bundle(load_adapted(str(base), {"legal": adapter}), tmp_path / "b")
    runtime = chameleon_deploy.load(tmp_path / "b", threads=1)
    answers = recorded_answers(runtime.bundle)
    assert list(answers.modes) == ["none", "static"]
    of_adapter, of_base = answers.modes["static"].token_logprobs[:2], answers.modes["none"].token_logprobs[:2]
    assert of_adapter[0] != of_base[0]  # adapters and none in turn
    assert of_adapter[1] == of_base[1]
    assert missed(runtime) == set()


def test_a_conditioned_bundle_has_vectors_of_its_own() -> None:
    given = chameleon_deploy.load(good_bundle("chameleon_given"), threads=1)
    vectors = np.asarray(adapt_rows(given, "request", 7).conditioning)
    assert vectors.argmax(1).tolist() == [0, 1, 2, 3, 4, 0, 1]
    assert list(known_answers(given).modes) == ["none", "request"]


def test_saturating_products_are_missed(int8_bundle: Path, int8_runtime: Runtime, copy_of: Copy) -> None:
    wrong = copy_of(int8_bundle)
    plant_saturation(wrong)
    found = missed(chameleon_deploy.load(wrong, threads=1))
    assert "hidden states, relative difference" in found
    assert {f"mode {mode}, log-probabilities, mean difference" for mode in ("none", "cohort")} <= found
    wrong = copy_of(int8_runtime.bundle.path)  # of a model whose log-probabilities they hardly change
    plant_saturation(wrong)
    assert missed(chameleon_deploy.load(wrong, threads=1)) == {"hidden states, relative difference"}


def test_wrong_tokens_are_missed(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    names = {f"mode {mode}, texts whose greedy tokens differ" for mode in recorded_answers(runtime.bundle).modes}
    greedy = HostLogits.greedy
    monkeypatch.setattr(HostLogits, "greedy", lambda logits: greedy(logits) ^ 1)
    assert missed(runtime) == names


def test_wrong_texts_are_missed(bundle: Path) -> None:
    runtime = chameleon_deploy.load(bundle, threads=1)
    runtime.tokenizer.enable_truncation(8)
    assert missed(runtime) == {"texts whose token ids differ"}


def test_answers_that_are_not_finite_are_missed(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise NumericError("the decoder produced logits that are not finite")

    monkeypatch.setattr(runtime, "score", broken)
    assert missed(runtime) == {f"mode {mode}" for mode in recorded_answers(runtime.bundle).modes}


RECORDS: dict[str, Callable[[dict[str, Any]], object]] = {
    "has no known_answers": lambda answers: answers.clear(),
    "Object missing required field": lambda answers: answers.pop("texts"),
    "Expected `float`": lambda answers: answers["modes"]["none"]["gaps"][0].append("x"),
    "rows differ": lambda answers: answers["rows"].clear(),
    "answers of mode 'static'": lambda answers: answers["modes"].update(static=answers["modes"]["none"]),
    "scores of other rows": lambda answers: answers["modes"]["none"]["token_logprobs"][0].pop(),
    "tokens of other rows": lambda answers: answers["modes"]["none"]["gaps"][0].pop(),
}


@pytest.mark.parametrize("message", RECORDS)
def test_a_record_that_cannot_be_read_is_refused(message: str, lora_bundle: Path, bundle: Path, copy_of: Copy) -> None:
    wrong = copy_of(lora_bundle if "missing" in message else bundle)
    parity = json.loads((wrong / PARITY).read_text())
    RECORDS[message](parity[FIELD])
    (wrong / PARITY).write_text(json.dumps({k: v for k, v in parity.items() if v}))
    reseal(wrong)
    with pytest.raises(ManifestError, match=message):
        recorded_answers(open_bundle(wrong))


WITHOUT_TORCH = (
    "import runpy, sys\nsys.modules['torch'] = None\nrunpy.run_module('chameleon_deploy.verify', {}, '__main__')"
)


def test_the_command(int8_bundle: Path, copy_of: Copy) -> None:
    """Without PyTorch: exit 0, 1 if an answer is missed, 2 for what goes with a reference."""

    def verify(*arguments: Any) -> subprocess.CompletedProcess[str]:
        words = [sys.executable, "-c", WITHOUT_TORCH, *map(str, arguments)]
        return subprocess.run(words, capture_output=True, text=True, check=False)

    good = verify(int8_bundle, "--here", "--json")
    record = json.loads(good.stdout)
    assert (good.returncode, good.stderr) == (0, "")
    assert record["verified"]
    assert record["provider"] == "cpu"
    assert record["machine"]["processor"]
    wrong = copy_of(int8_bundle)
    plant_saturation(wrong)
    bad = verify(wrong, "--here", "--threads", 1)
    assert bad.returncode == 1
    assert "MISSED" in bad.stdout
    assert bad.stderr.count("\n") == 1
    assert "hidden states" in bad.stderr
    for arguments in (["--here", "--max-kl", 1], ["--here", "--reference", int8_bundle], []):
        refused = verify(int8_bundle, *arguments)
        assert (refused.returncode, refused.stderr.count("\n")) == (2, 1), arguments


def test_a_server_checks_itself_before_it_serves(int8_bundle: Path, copy_of: Copy) -> None:
    wrong = copy_of(int8_bundle)
    plant_saturation(wrong)
    done = run("chameleon_deploy.serve", wrong, "--port", 0, "--self-check", timeout=120)
    assert done.returncode == 1
    assert "failed: " in done.stderr.splitlines()[-1]
    assert "hidden states" in done.stderr.splitlines()[-1]
    with running(int8_bundle, self_check=True):  # until it is healthy
        pass


def test_figures_are_relative_and_of_all_values(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = np.array(recorded_answers(runtime.bundle).hidden_states)
    monkeypatch.setattr(here, "hidden_states", lambda *_: (1.25 * expected).tolist())
    _, states, logprobs, *_ = known_answer_checks(runtime)
    assert states.value == pytest.approx(0.25)
    assert logprobs.value < 1e-4
    monkeypatch.setattr(here, "hidden_states", lambda *_: (math.nan * expected).tolist())
    assert not known_answer_checks(runtime)[1].passed
