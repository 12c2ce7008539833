"""What a submit is made of: the rows of its prompts, and of continuations that are given."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import processors

import chameleon_deploy
from chameleon_deploy import Adapt, Generate, Runtime, Sampling
from chameleon_deploy.errors import ChameleonError, InputError, LengthError
from chameleon_deploy.runtime.engine.submission import Submission, form_cohort, prepare, prepare_scores
from chameleon_deploy.runtime.engine.tenants import Tenant
from chameleon_deploy.runtime.sampling import SCORED, Given
from tests.shared_data import good_bundle

TENANT, NONE = Tenant("one"), Adapt(mode="none")


def scores(runtime: Runtime, prompts: Any, continuations: Any, capacity: int = 32, **fields: Any) -> Submission:
    return prepare_scores(runtime, prompts, continuations, Generate(**fields), NONE, capacity, TENANT)


def given(submission: Submission) -> list[list[int]]:
    """The tokens that the rows take, one after another."""
    samplers = [member.row.sampler for member in submission.members]
    assert all(isinstance(sampler, Given) for sampler in samplers)
    return [list(vars(sampler)["_token_ids"]) for sampler in samplers]


def test_a_prompt_fills_a_row(runtime: Runtime) -> None:
    found = prepare(runtime, [[1, 2, 3], [4]], Generate(n=2, max_new_tokens=5), NONE, 3, TENANT)
    assert [list(member.row.prompt) for member in found.members] == [[1, 2, 3]] * 2 + [[4]] * 2
    assert [member.row.limit for member in found.members] == [1, 1, 3, 3]
    assert all(member.tenant is TENANT for member in found.members)
    with pytest.raises(LengthError, match="prompt 1 has 4 tokens, a row of this engine holds 3") as refused:
        prepare(runtime, [[1], [1, 2, 3, 4]], Generate(), NONE, 3, TENANT)
    assert refused.value.argument == "prompts"


def test_drafts_that_a_bundle_does_not_make_are_refused(int8_runtime: Runtime) -> None:
    prepare(int8_runtime, [[1]], Generate(), NONE, 8)
    with pytest.raises(ChameleonError) as refused:
        prepare(int8_runtime, [[1]], Generate(prompt_lookup_num_tokens=4), NONE, 8)
    assert refused.value.argument == "prompt_lookup_num_tokens"


def test_each_continuation_follows_its_prompt(runtime: Runtime) -> None:
    found = scores(runtime, [[1, 2], [3]], [[4, 5, 6], [7]])
    assert [list(member.row.prompt) for member in found.members] == [[1, 2], [3]]
    assert given(found) == [[4, 5, 6], [7]]
    assert [member.row.limit for member in found.members] == [3, 1]
    assert [member.tenant for member in found.members] == [TENANT] * 2


def test_one_prompt_is_that_of_every_continuation(runtime: Runtime) -> None:
    found = scores(runtime, [[1, 2]], [[4], [5], [6, 7]])
    assert [list(member.row.prompt) for member in found.members] == [[1, 2]] * 3
    assert given(found) == [[4], [5], [6, 7]]
    assert given(scores(runtime, ["The river"], [" runs", " is a lake"])) == given(
        scores(runtime, ["The river"] * 2, [" runs", " is a lake"])
    )


def test_texts_are_encoded_together_and_cut_after_the_prompt(runtime: Runtime) -> None:
    """The tokens of "river" and "s" apart are not those of "rivers"."""
    prompt, continuation = "The river", "s run"
    (member,) = scores(runtime, [prompt], [continuation]).members
    head, whole = runtime.encode([prompt])[0], runtime.encode([prompt + continuation])[0]
    assert list(member.row.prompt) == whole[: len(head)]
    assert given(scores(runtime, [prompt], [continuation])) == [whole[len(head) :]]


def test_texts_after_token_ids_are_encoded_alone(runtime: Runtime) -> None:
    found = scores(runtime, [[1, 2], [3]], [" runs", " is a lake"])
    assert [list(member.row.prompt) for member in found.members] == [[1, 2], [3]]
    assert given(found) == runtime.encode([" runs", " is a lake"], add_special_tokens=False)


def test_only_a_prompt_has_special_tokens_around_it() -> None:
    runtime = chameleon_deploy.load(good_bundle("chameleon_masked"), threads=1)
    (head,), (rest,) = runtime.encode(["one"]), runtime.encode([" two"])
    runtime.tokenizer.post_processor = processors.TemplateProcessing(
        "<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    for prompt in ("one", [0, *head]):
        found = scores(runtime, [prompt], [" two"])
        assert [list(member.row.prompt) for member in found.members] == [[0, *head]]
        assert given(found) == [rest]


def test_a_cohort_gives_each_row_the_factors_of_its_prompt(runtime: Runtime) -> None:
    """However its prompts were submitted, and however many rows each has."""
    prompts, adapt = [[5, 9, 301], [17, 44, 2, 8], [90, 91, 92]], Adapt(mode="request")

    def submitted(*parts: list[list[int]], n: int = 1) -> list[Any]:
        submissions = [prepare(runtime, part, Generate(n=n), adapt, 32, TENANT) for part in parts]
        form_cohort(runtime, submissions, 7)
        return [member.source.item.tolist() for submission in submissions for member in submission.members]

    alone = submitted(prompts)
    assert len({str(item) for item in alone}) == 3
    assert submitted(prompts[:1], prompts[1:]) == submitted(prompts[:2], prompts[2:]) == alone
    assert submitted(prompts[:1], prompts[1:], n=2) == [item for item in alone for _ in range(2)]


def test_what_a_continuation_takes_its_own_way(runtime: Runtime) -> None:
    """Sampling, n, drafts and limits of the caller are not those of rows that are given."""
    found = scores(runtime, [[1, 2]], [[4, 5]], n=3, max_new_tokens=1, sampling=Sampling(temperature=2.0),
                   prompt_lookup_num_tokens=4, cache_salt="mine", deadline=5.0)  # fmt: skip
    (member,) = found.members
    assert (member.row.sampling, member.row.limit, member.draft_tokens) == (SCORED, 2, 0)
    assert member.cache_salt == "mine"
    assert member.deadline < float("inf")
    assert found.stream.n == 1


def test_a_prompt_and_its_continuation_fill_a_row(runtime: Runtime) -> None:
    assert given(scores(runtime, [[1, 2]], [[4, 5]], capacity=4)) == [[4, 5]]
    with pytest.raises(LengthError, match="prompt 1 and its continuation have more than 4 tokens") as refused:
        scores(runtime, [[1, 2], [3]], [[4, 5], [6, 7, 8, 9]], capacity=4)
    assert refused.value.argument == "continuations"


@pytest.mark.parametrize(
    ("prompts", "continuations", "message"),
    [
        ([[1], [2]], [[3]], "1 continuations of 2 prompts: pass one each"),
        ([[1], [2]], [[3]] * 3, "3 continuations of 2 prompts: pass one each"),
        (["a", " "], ["c", "the"], "continuation 1 adds no token to its prompt"),  # " the" is one token
        ([[1], [2]], [[3], []], "text 1 is empty: every text needs at least one token"),
    ],
)
def test_continuations_that_do_not_fit(runtime: Runtime, prompts: Any, continuations: Any, message: str) -> None:
    with pytest.raises(InputError, match=message) as refused:
        scores(runtime, prompts, continuations)
    assert refused.value.argument == "continuations"
