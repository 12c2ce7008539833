"""lm-evaluation-harness reads its log-likelihoods from the server: `LM_EVAL=path/to/lm-eval pytest -m lm_eval`.

In an environment of its own with `lm-eval[api,hf]`, 0.4.13 or newer, torch and transformers. About a minute.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from chameleon_deploy import Runtime
from tests.lm_evaluation import POSITIONS, TOLERANCE, evaluate, evaluate_server, expected, likelihoods, write_tasks
from tests.serving import running

pytestmark = pytest.mark.lm_eval


@pytest.fixture(scope="module")
def tasks(runtime: Runtime, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks"), runtime, documents=100)


def test_likelihoods_are_the_runtimes_and_those_of_transformers(
    tasks: Path, bundle: Path, mini_path: Path, runtime: Runtime, tmp_path: Path
) -> None:
    with running(bundle) as server:
        served, samples = evaluate_server(tasks, tmp_path / "served", server.url, f"{server.name}:none")
    base, its_samples = evaluate(
        tasks, tmp_path / "base", "hf", f"pretrained={mini_path / 'base'},dtype=float32,max_length={POSITIONS - 2}"
    )
    assert len(samples) == len(its_samples) == 200
    greedy = 0
    for sample, its_sample in zip(samples, its_samples, strict=True):
        assert sample["doc"] == its_sample["doc"]
        wanted = expected(runtime, sample)
        for found, rel in ((likelihoods(sample), 0), (likelihoods(its_sample), 2**-23)):  # hf's sums are float32
            assert [value for value, _ in found] == pytest.approx([value for value, _ in wanted], rel, TOLERANCE)
            assert [is_greedy for _, is_greedy in found] == [is_greedy for _, is_greedy in wanted]
        greedy += sum(bool(is_greedy) for _, is_greedy in wanted)
    assert 50 < greedy < 300
    for task, metrics in base.items():
        for name, value in metrics.items():
            if isinstance(value, float):
                assert served[task][name] == pytest.approx(value, rel=1e-5), (task, name)
