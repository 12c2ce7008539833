"""Log-probabilities of a prompt's tokens agree with scoring, and with what greedy decoding reports."""

from __future__ import annotations

import pytest

from chameleon_deploy import Runtime, Sampling
from chameleon_deploy.runtime.scoring import prompt_logprobs
from tests.rows import random_rows


@pytest.mark.parametrize("graph", ["runtime", "portable"])
def test_they_are_the_scores(graph: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime: Runtime = request.getfixturevalue(graph)
    monkeypatch.setattr("chameleon_deploy.runtime.decode.shared_cache.SCORED_TOKENS", 16)  # several pieces
    for ids in [*random_rows(2, 5, 100), [3]]:
        factors = runtime.adapt([ids], mode="request").factors
        choices = prompt_logprobs(ids, runtime.decoder, factors, 5)
        score = runtime.score([ids], mode="request")[0]
        assert [choice.token_id for choice in choices] == ids[1:]
        assert [choice.logprob for choice in choices] == pytest.approx(score.token_logprobs, abs=1e-4)


def test_a_greedy_token_is_the_first_alternative_by_the_same_float(runtime: Runtime) -> None:
    sampling = Sampling(ignore_eos=True, logprobs=1)
    generation = runtime.generate([[5, 6, 7]], max_new_tokens=20, mode="none", sampling=sampling)[0]
    ids = [5, 6, 7, *generation.token_ids]
    found = prompt_logprobs(ids, runtime.decoder, runtime.adapt([ids], mode="none").factors, 1)[2:]
    assert [choice.logprob for choice in found] == pytest.approx(generation.token_logprobs, abs=1e-4)
    for choice in found:
        assert choice.top_logprobs == ((choice.token_id, choice.logprob),)
