"""Structured outputs: every row's text is what its schema, expression, choices or grammar says."""

from __future__ import annotations

import re
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import chameleon_deploy
from chameleon_deploy import Engine, Generation, Runtime, Sampling, StructuredOutputs
from chameleon_deploy.contract.bundle import FloatArray
from chameleon_deploy.errors import DependencyError, InputError
from chameleon_deploy.runtime import runtime as runtime_module
from chameleon_deploy.runtime import sampling as sampling_module
from chameleon_deploy.runtime.decode.logits import HostLogits
from chameleon_deploy.runtime.engine.loop import Loop
from chameleon_deploy.runtime.generation import choosers
from chameleon_deploy.runtime.sampling import Choice, Sampler
from chameleon_deploy.runtime.structured_outputs import KEPT, MAX_CHARACTERS, Grammars, TokenMask
from tests.rows import random_rows

FLAGS = {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 3}
SCHEMA = {"type": "object", "properties": {"a": {"enum": [1, "x", None]}, "b": FLAGS}, "required": ["a", "b"],
          "additionalProperties": False}  # fmt: skip
# Each with an expression for its texts.
KINDS = [
    (StructuredOutputs(json=SCHEMA), r'\{"a": (1|"x"|null), "b": \[(true|false)(, (true|false)){0,2}\]\}'),
    (StructuredOutputs(regex=r"[a-f]{3,6}-[0-9]{2}"), r"[a-f]{3,6}-[0-9]{2}"),
    (StructuredOutputs(choice=["red", 'gr"ün', "reddish"]), 'red|gr"ün|reddish'),
    (StructuredOutputs(grammar='start: "(" start ")" | /[xy]{2}/'), r"\(*[xy]{2}\)*"),
    (StructuredOutputs(grammar='root ::= "yes" | "no" " "?'), "yes|no ?"),
]
ROWS = random_rows(5, len(KINDS) + 2, 20)
HOT = [Sampling(temperature=1.5, seed=seed, structured_outputs=outputs) for seed, (outputs, _) in enumerate(KINDS)]
HOT += [Sampling(temperature=1.5, seed=90), Sampling()]
LIMIT = 80
REPEATING = [7, 8, 9, 10, 11] * 4


def check_texts(generations: list[Generation]) -> None:
    """Every row that has structured outputs ended by itself, with a text that they allow."""
    for (_, pattern), generation in zip(KINDS, generations, strict=False):
        assert generation.finish_reason == "stop", generation
        assert re.fullmatch(pattern, generation.text), generation.text


def test_rows_of_every_kind_share_a_batch(runtime: Runtime) -> None:
    generations = runtime.generate(ROWS, max_new_tokens=LIMIT, sampling=HOT)
    check_texts(generations)
    alone = [runtime.generate([ROWS[i]], max_new_tokens=LIMIT, sampling=[HOT[i]], mode="centroid") for i in range(7)]
    together = runtime.generate(ROWS, max_new_tokens=LIMIT, sampling=HOT, mode="centroid")
    assert together == [generation for (generation,) in alone]
    tokens = [token for token in runtime.stream(ROWS, max_new_tokens=LIMIT, sampling=HOT) if token.generation]
    assert sorted((t.row, t.generation.text) for t in tokens if t.generation) == list(
        enumerate(g.text for g in generations)
    )
    with Engine(runtime, rows=3, prefill_tokens=8) as engine:
        assert engine.submit(ROWS, max_new_tokens=LIMIT, sampling=HOT).result(60) == generations


def test_int8_rows(int8_runtime: Runtime) -> None:
    check_texts(int8_runtime.generate(ROWS, max_new_tokens=LIMIT, sampling=HOT))


def test_continuations_have_masks_of_their_own(runtime: Runtime) -> None:
    sampling = replace(HOT[0], seed=3)
    generations = runtime.generate([ROWS[0]], max_new_tokens=LIMIT, sampling=[sampling], n=6)
    for generation in generations:
        check_texts([generation])
    assert len({generation.text for generation in generations}) > 1


def allowed_by(outputs: StructuredOutputs, runtime: Runtime) -> Callable[[list[int]], set[int]]:
    """Return a function from the tokens of a row to those that may be next."""

    def allowed(ids: list[int]) -> set[int]:
        mask = runtime.new_mask(Sampling(structured_outputs=outputs))
        assert mask is not None
        for token_id in ids:
            mask.append(token_id)
        return set(np.flatnonzero(mask.allowed()).tolist())

    return allowed


def check_greedy(runtime: Runtime) -> None:
    """A greedy token is the highest of those allowed: where all others have a bias that no logit outweighs."""
    vocab = runtime.manifest.model.vocab_size
    for outputs, _ in KINDS[:3]:
        allowed = allowed_by(outputs, runtime)
        for draft_tokens in (0, 4):
            (found,) = runtime.generate(
                [REPEATING], max_new_tokens=LIMIT, sampling=Sampling(structured_outputs=outputs), mode="none",
                prompt_lookup_num_tokens=draft_tokens,
            )  # fmt: skip
            check = found.token_ids
            for i in range(len(check)):
                biases = dict.fromkeys(set(range(vocab)) - allowed(check[:i]), -100.0)
                sampling = Sampling(logit_bias=biases, ignore_eos=True)
                (step,) = runtime.generate([REPEATING + check[:i]], max_new_tokens=1, sampling=sampling, mode="none")
                assert step.token_ids == [check[i]]


def check_drafts(runtime: Runtime) -> None:
    """Drafts change no token of a constrained row, also where they are of its own, repeating text."""
    outputs = StructuredOutputs(grammar='start: "[" item ("," item){4,12} "]"\nitem: "ab" | "ac" | /[0-9]{2}/')
    drafted = 0
    for seed in range(4):
        for sampling in (Sampling(structured_outputs=outputs), Sampling(0.8, seed=seed, structured_outputs=outputs)):
            plain, found = (
                runtime.generate([ROWS[seed]], max_new_tokens=LIMIT, sampling=sampling, prompt_lookup_num_tokens=n)[0]
                for n in (0, 8)
            )
            assert found == plain
            assert re.fullmatch(r"\[(ab|ac|[0-9]{2})(,(ab|ac|[0-9]{2})){4,12}\]", found.text)
            drafted += 1
    assert drafted == 8


def check_continuations(runtime: Runtime) -> None:
    sampling = replace(HOT[0], seed=3)
    for generation in runtime.generate([ROWS[0]], max_new_tokens=LIMIT, sampling=[sampling], n=4):
        check_texts([generation])


def check_rows(runtime: Runtime) -> None:
    check_texts(runtime.generate(ROWS, max_new_tokens=LIMIT, sampling=HOT))


def check_ends(runtime: Runtime) -> None:
    """The end is allowed where the text may end and nowhere else."""
    for text, ends in (("", False), ("a", True), ("aa", True), ("aaa", True)):
        mask = runtime.new_mask(Sampling(structured_outputs=StructuredOutputs(regex="a{1,3}"), stop_token_ids=[300]))
        assert mask is not None
        for _ in text:
            mask.append(runtime.encode(["a"])[0][0])
        assert (bool(mask.allowed()[0]), bool(mask.allowed()[300])) == (ends, ends), text


CHECKS = (check_rows, check_greedy, check_drafts, check_continuations, check_ends)


@pytest.mark.parametrize("check", CHECKS)
def test_what_rows_are_held_to(check: Callable[[Runtime], None], runtime: Runtime) -> None:
    check(runtime)


def no_mask(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(TokenMask, "allowed", lambda _: np.ones(512, bool))
    patch.setattr(TokenMask, "append", lambda *_: None)


def mask_of_another_row(patch: pytest.MonkeyPatch) -> None:
    new_mask, made = runtime_module.Runtime.new_mask, list[TokenMask | None]()

    def swapped(self: Runtime, sampling: Sampling) -> TokenMask | None:
        made.append(new_mask(self, sampling))
        if len(made) == 2 and made[0] is not None and made[1] is not None:
            made[0].__dict__, made[1].__dict__ = made[1].__dict__, made[0].__dict__
        return made[-1]

    patch.setattr(runtime_module.Runtime, "new_mask", swapped)


def mask_after_sampling(patch: pytest.MonkeyPatch) -> None:
    choose = sampling_module.choose

    def choose_first(logits: FloatArray, counts: Any, sampling: Sampling, u: float, allowed: Any = None) -> int:
        chosen = choose(logits, counts, sampling, u)
        return chosen if allowed is None or allowed[chosen] else int(np.flatnonzero(allowed)[0])

    patch.setattr(sampling_module, "choose", choose_first)


def masks_of_drafts_not_advanced(patch: pytest.MonkeyPatch) -> None:
    def accept(self: Any, member: Any, draft: Any, logits: FloatArray) -> None:
        masks = [member.row.sampler._mask.allowed().copy()] * (len(draft) + 1)
        for i, mask in enumerate(masks):
            (choose,) = choosers([member.row.sampler], HostLogits(logits[i : i + 1]))
            member.row.sampler._mask.allowed = lambda mask=mask: mask
            self._append(member, choose)
            del member.row.sampler._mask.allowed
            if member in self._ended or (i < len(draft) and member.row.token_ids[-1] != draft[i]):
                break
        self.batch.cut()

    patch.setattr(Loop, "_accept", accept)


def masks_advanced_by_whole_drafts(patch: pytest.MonkeyPatch) -> None:
    accept = Loop._accept

    def eager(self: Any, member: Any, draft: Any, logits: FloatArray) -> None:
        for token_id in draft:
            member.row.sampler._mask._matcher.consume_token(token_id)
        accept(self, member, draft, logits)

    patch.setattr(Loop, "_accept", eager)


def state_not_advanced(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(TokenMask, "append", lambda *_: None)


def one_state_for_all_continuations(patch: pytest.MonkeyPatch) -> None:
    mask, made = Grammars.mask, dict[Any, TokenMask]()

    def shared(self: Grammars, outputs: StructuredOutputs, *rest: Any) -> TokenMask:
        return made.setdefault(outputs, mask(self, outputs, *rest))

    patch.setattr(Grammars, "mask", shared)


def end_allowed_everywhere(patch: pytest.MonkeyPatch) -> None:
    allowed = TokenMask._next

    def more(self: TokenMask) -> Any:
        found = allowed(self)
        found[0] = True
        return found

    patch.setattr(TokenMask, "_next", more)


def end_without_stop_tokens(patch: pytest.MonkeyPatch) -> None:
    mask = Grammars.mask
    patch.setattr(Grammars, "mask", lambda self, outputs, _, ignore_eos: mask(self, outputs, (), ignore_eos))


def a_choice_that_ignores_the_mask(patch: pytest.MonkeyPatch) -> None:
    def greedy(self: Sampler, logits: FloatArray) -> Choice:
        return Choice(int(logits.argmax()))

    patch.setattr(Sampler, "choose", greedy)


FAULTS = [
    (no_mask, check_rows), (mask_of_another_row, check_rows), (mask_after_sampling, check_greedy),
    (masks_of_drafts_not_advanced, check_drafts), (masks_advanced_by_whole_drafts, check_drafts),
    (state_not_advanced, check_rows), (one_state_for_all_continuations, check_continuations),
    (end_allowed_everywhere, check_ends), (end_without_stop_tokens, check_ends),
    (a_choice_that_ignores_the_mask, check_rows),
]  # fmt: skip


@pytest.mark.parametrize(("fault", "check"), FAULTS)
def test_a_planted_fault_is_seen(
    fault: Callable[[pytest.MonkeyPatch], None], check: Callable[[Runtime], None], runtime: Runtime,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    fault(monkeypatch)
    with pytest.raises((AssertionError, InputError)):
        check(runtime)


def test_the_end_of_the_text_with_and_without_the_end_token(runtime: Runtime) -> None:
    def ended(outputs: StructuredOutputs, **fields: Any) -> tuple[str, str]:
        sampling = Sampling(structured_outputs=outputs, **fields)
        (found,) = runtime.generate([ROWS[0]], max_new_tokens=12, sampling=sampling)
        return found.text, found.finish_reason

    a = runtime.encode(["a"])[0][0]
    fixed, open_ended = StructuredOutputs(regex="aaa"), StructuredOutputs(regex="[ab]{3,}")
    assert ended(fixed) == ended(fixed, ignore_eos=True) == ("aaa", "stop")
    text, reason = ended(open_ended, ignore_eos=True)
    assert reason == "length" and re.fullmatch("[ab]{12,}", text)
    # Where the text may end, a bias chooses among the tokens that end it.
    assert ended(open_ended, logit_bias={0: 100.0})[1] == "stop"
    (found,) = runtime.generate(
        [ROWS[0]], max_new_tokens=12,
        sampling=Sampling(structured_outputs=open_ended, stop_token_ids=[300], logit_bias={300: 100.0}),
    )  # fmt: skip
    assert (found.token_ids[-1], found.finish_reason) == (300, "stop") and re.fullmatch("[ab]{3,}", found.text)
    # A stop token that the grammar takes as text ends the row too, and a stop string cuts it.
    assert ended(fixed, stop_token_ids=[a], logit_bias={a: 100.0}) == ("", "stop")
    assert ended(fixed, stop=["aa"], logit_bias={a: 100.0}) == ("", "stop")


def test_log_probabilities_are_those_of_the_raw_logits(runtime: Runtime) -> None:
    sampling = Sampling(structured_outputs=KINDS[1][0], logprobs=5)
    (found,) = runtime.generate([ROWS[0]], max_new_tokens=LIMIT, sampling=sampling, mode="none")
    assert found.token_logprobs is not None and found.top_logprobs is not None
    (score,) = runtime.score([ROWS[0] + found.token_ids], mode="none")
    assert found.token_logprobs == pytest.approx(score.token_logprobs[len(ROWS[0]) - 1 :], abs=1e-4)
    assert any(chosen not in dict(top) for chosen, top in zip(found.token_ids, found.top_logprobs, strict=True))


def test_a_bias_allows_no_token_that_the_grammar_excludes(runtime: Runtime) -> None:
    sampling = replace(HOT[1], logit_bias={9: 100.0, 250: 100.0}, presence_penalty=2.0, repetition_penalty=0.5)
    (found,) = runtime.generate([ROWS[0]], max_new_tokens=LIMIT, sampling=sampling)
    assert re.fullmatch(KINDS[1][1], found.text)


WRONG: list[tuple[dict[str, Any], str]] = [
    ({}, "exactly one"), ({"regex": "a", "choice": ["b"]}, "exactly one"), ({"regex": 5}, "pass a text"),
    ({"choice": []}, "at least one"), ({"choice": "ab"}, "at least one"), ({"choice": 5}, "at least one"),
    ({"choice": [5]}, "at least one"),
    ({"json": {"x": object()}}, "cannot be written"), ({"regex": "a" * (MAX_CHARACTERS + 1)}, "at most 65,536"),
    ({"json": "{"}, "json: "), ({"json": "5"}, "must be an object"), ({"json": {"not": {}}}, "Unimplemented keys"),
    ({"json": {"$ref": "http://127.0.0.1:9/x.json"}}, "does not fetch"), ({"json": {"$ref": "#/$defs/x"}}, "json: "),
    ({"json": {"$ref": "file:///etc/passwd"}}, "does not fetch"), ({"json": {"type": "strange"}}, "json: "),
    ({"json": {"type": "string", "x-guidance": {"lenient": True}, "not": {}}}, "Unimplemented keys"),
    ({"json": {"allOf": [{"type": "string"}, {"type": "number"}]}}, "Unsatisfiable"),
    ({"regex": "("}, "regex: "), ({"regex": "(?=a)b"}, "regex: "), ({"grammar": "start: x"}, "grammar: "),
    ({"grammar": 'root ::= "a'}, "grammar: "), ({"grammar": '{"grammars": []}'}, "grammar: "),
    ({"choice": ["\ud800"]}, "choice: "), ({"json": '{"a": ' * 5000 + "1" + "}" * 5000}, "json: "),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "message"), WRONG)
def test_what_makes_no_sense_is_refused_before_anything_runs(
    fields: dict[str, Any], message: str, runtime: Runtime
) -> None:
    with Engine(runtime, rows=1) as engine:
        for call in (runtime.generate, runtime.stream, engine.submit):
            with pytest.raises(InputError, match=message) as found:
                call([ROWS[0]], sampling=Sampling(structured_outputs=StructuredOutputs(**fields)))
            assert found.value.argument == "structured_outputs"
            assert len(str(found.value)) < 600


def test_without_llguidance(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    monkeypatch.delitem(sys.modules, "chameleon_deploy.runtime.compile_process", raising=False)
    monkeypatch.delattr(chameleon_deploy.runtime, "compile_process", raising=False)
    with pytest.raises(DependencyError, match=r"chameleon-deploy\[structured\]"):
        Grammars(runtime.tokenizer, 512, 0)


def test_what_was_compiled_is_kept_and_bounded(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    grammars, asked = Grammars(runtime.tokenizer, 512, 0), list[Any]()
    ask = grammars._process.ask

    def counted(question: Any) -> dict[str, str]:
        asked.append(question)
        return ask(question)

    monkeypatch.setattr(grammars._process, "ask", counted)
    outputs = [StructuredOutputs(choice=[str(i)]) for i in range(KEPT + 5)]
    threads = [threading.Thread(target=grammars.mask, args=(outputs[0], (), False)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(asked) == 1  # the others wait for the first
    for each in outputs[1:]:
        grammars.mask(each, (), ignore_eos=False)
        grammars.mask(outputs[0], (), ignore_eos=False)
    assert len(asked) == len(grammars._kept) + 5 == KEPT + 5
    assert outputs[0] in grammars and outputs[1] not in grammars and outputs[-1] in grammars


def test_a_limit_that_one_row_meets_is_none_for_later_rows(runtime: Runtime) -> None:
    grammars, chance = Grammars(runtime.tokenizer, 512, 0), np.random.default_rng(0)
    outputs = StructuredOutputs(regex="[ab]*a[ab]{60}[cd]*")  # of 2**60 states
    ids = [runtime.encode([letter])[0][0] for letter in "ab"]
    mask = grammars.mask(outputs, (), ignore_eos=False)
    with pytest.raises(InputError, match="too many states"):
        for _ in range(100_000):
            mask.allowed()
            mask.append(int(chance.choice(ids)))
    assert grammars.mask(outputs, (), ignore_eos=False).allowed()[ids].all()


def chain(length: int) -> dict[str, Any]:
    links = {f"a{i}": {"$ref": f"#/$defs/a{i + 1}"} for i in range(length)}
    return {"$ref": "#/$defs/a0", "$defs": {**links, f"a{length}": {"type": "null"}}}


# Each took seconds, hundreds of megabytes or the process where nothing bounded it.
HOSTILE = {
    "deep references": StructuredOutputs(json=chain(1800)),
    "deep rules": StructuredOutputs(
        grammar="start: r0\n" + "".join(f"r{i}: r{i + 1}\n" for i in range(4500)) + 'r4500: "a"'
    ),
    "terminals that double": StructuredOutputs(
        grammar="start: R0\n" + "".join(f"R{i}: R{i + 1} R{i + 1}\n" for i in range(2500)) + 'R2500: "a"'
    ),
    "nested repetitions": StructuredOutputs(regex="(((a{1000}){1000}){1000})"),
    "pairs of patterns": StructuredOutputs(
        json={"type": "object", "patternProperties": {f"^{i}.*z{i}$": {} for i in range(2500)}}
    ),
}


@pytest.mark.parametrize("outputs", HOSTILE.values(), ids=HOSTILE)
def test_what_takes_too_much_is_an_error_and_harms_nobody(outputs: StructuredOutputs, runtime: Runtime) -> None:
    with Engine(runtime, rows=2) as engine:
        other = engine.submit([ROWS[0]], max_new_tokens=LIMIT)
        with pytest.raises(InputError, match="it takes more than 1 seconds, 128 MB, or the stack") as found:
            engine.submit([ROWS[0]], sampling=Sampling(structured_outputs=outputs))
        assert found.value.argument == "structured_outputs"
        assert other.result(60) == runtime.generate([ROWS[0]], max_new_tokens=LIMIT)
        new = StructuredOutputs(choice=[f"n{list(HOSTILE.values()).index(outputs)}"])
        (generation,) = engine.submit([ROWS[0]], sampling=Sampling(structured_outputs=new)).result(60)
        assert generation.finish_reason == "stop"


def test_a_step_that_takes_too_much_ends_its_row_alone(runtime: Runtime) -> None:
    sampling = [Sampling(structured_outputs=StructuredOutputs(grammar='start: ("a"{1000}){1000}')), Sampling()]
    failed, other = runtime.generate([ROWS[0]] * 2, max_new_tokens=5, sampling=sampling, errors="row")
    assert failed.finish_reason == "error" and isinstance(failed.error, InputError)
    assert failed.error.argument == "structured_outputs"
    assert other == runtime.generate([ROWS[0]] * 2, max_new_tokens=5, sampling=[Sampling()] * 2)[1]
