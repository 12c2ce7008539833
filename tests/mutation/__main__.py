"""`python -m tests.mutation [MODULE ...]`: mutate modules and count the mutants that their tests do not notice.

Results are kept in --json. A mutant that was killed stays so until its module changes; survivors are tried again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.mutation.operators import mutants
from tests.mutation.trial import PREPARE, Outcome, import_heavy, serve, set_environment, tests_of, try_anew

ROOT = Path(__file__).parents[2]
SHARED = "tests/contract/test_shared_data.py"
HOSTILE, GOLDEN = f"{SHARED}::test_a_hostile_bundle_is_refused_with_its_code", f"{SHARED}::test_golden"
PROVENANCE, INPUTS = "tests/contract/test_provenance.py", "tests/runtime/test_inputs.py"
GENERATION, DOCS = "tests/runtime/test_generation.py", "tests/test_docs.py"
ADAPTERS = "tests/verify/test_adapter_checks.py"
ENGINE, TENANTS = "tests/runtime/test_engine.py", "tests/runtime/test_tenants.py"
FAULTS, HOSTILE_CLIENTS = "tests/serve/test_faults.py", "tests/serve/test_hostile_clients.py"
CHECKS = tuple(f"verify.{name}" for name in ("checkpoint_checks", "logit_checks", "promises", "wrong_factors"))
# Each module with the few tests that are meant to hold it: first those that need no fixture of tests/conftest.py, and
# so neither PyTorch nor an export; then, for some, those that try what is left.
TESTS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "contract.bundle": (("tests/contract/test_bundle_tensors.py", HOSTILE, f"{PROVENANCE}::test_signatures"),
                        ("tests/contract/test_bundle.py", "tests/contract/test_unchanged.py")),
    "contract.manifest": (("tests/contract/test_manifest.py", HOSTILE), ()),
    "contract.signature": (("tests/contract/test_signature.py", HOSTILE), ()),
    "contract.provenance": (tuple(f"{PROVENANCE}::{name}" for name in (
        "test_signatures", "test_a_signature_that_is_a_link_or_cannot_be_read", "test_signatures_without_cryptography",
        "test_keys_that_cannot_sign", "test_what_a_key_signs_is_signed_by_it",
        "test_trusted_keys_of_a_wrong_type")), ()),
    "verify.gates": (("tests/verify/test_gates.py",),
                     (f"{DOCS}::test_the_design_page_has_the_gates_of_the_code",)),
    **dict.fromkeys(CHECKS, ((), (
        f"{DOCS}::test_the_design_page_has_the_limits_of_updates", "tests/verify/test_check_figures.py",
        *(f"tests/verify/test_checks.py::{name}" for name in (
            "test_an_update_is_compared_over_all_logits", "test_tenants_share_clusters",
            "test_vectors_of_a_row_have_length_one_and_depend_on_the_row")),
        "tests/verify/test_text_checks.py", "tests/runtime/test_device.py::test_it_passes_the_gates"))),
    "verify.adapter_checks": ((), (f"{ADAPTERS}::test_each_step_has_its_rows_and_its_adapters", *(
        f"{ADAPTERS}::test_{name}" for name in (
            "figures_of_one_adapter", "figures_of_the_base_model", "figures_of_factors", "figures_of_factors_alone",
            "wrong_factors_move_a_right_bundle_as_far", "another_adapter_is_the_next_one")))),
    "verify.run": ((), (
        f"{DOCS}::test_the_design_page_has_the_texts_of_verify", "tests/verify/test_run.py",
        "tests/verify/test_checks.py::test_reduced_precisions_have_windows_of_one_kind_of_text",
        f"{ADAPTERS}::test_the_adapters_must_be_the_bundles")),
    "verify.logit_figures": (("tests/verify/test_logit_figures.py",), ()),
    "runtime.adaptation": (("tests/runtime/test_adaptation.py", GOLDEN), ()),
    "runtime.factors": (("tests/runtime/test_factors.py", GOLDEN), ()),
    "runtime.sampling": (("tests/runtime/test_sampling.py", SHARED), ()),
    "runtime.sampling_settings": (("tests/runtime/test_sampling.py", "tests/runtime/test_types.py"), ()),
    "runtime.inputs": (tuple(f"{INPUTS}::{name}" for name in (
        "test_texts_become_token_ids_with_the_special_tokens_around_them", "test_token_ids_at_their_limits",
        "test_integers_at_their_limits", "test_numbers_at_their_limits", "test_limits_of_threads_and_rows",
        "test_one_limit_of_new_tokens_or_one_per_row", "test_what_holds_several_values", "test_a_path")), ()),
    "runtime.tokenizer": (("tests/runtime/test_tokenizer.py", HOSTILE), ()),
    "runtime.generation": ((*(f"{GENERATION}::{name}" for name in (
        "test_a_row_ends_at_its_limit", "test_a_row_ends_before_its_first_stop_string",
        "test_the_longest_beginning_of_a_stop_string_is_held_back", "test_a_stop_token_has_no_text",
        "test_special_tokens_have_no_text", "test_rows_of_prompts", "test_streams_of_random_numbers")),
        GOLDEN, f"{SHARED}::test_schedules"),
        (GENERATION, "tests/runtime/test_runtime_errors.py")),
    "runtime.decode.schedule": (("tests/runtime/test_schedule.py",), ()),
    "runtime.adapters": ((f"{SHARED}::test_an_adapter_file_is_loaded_or_refused_with_its_code",),
                         ("tests/runtime/test_adapters.py", "tests/runtime/test_activated_adapters.py",
                          "tests/runtime/test_types.py")),
    **{
        f"runtime.engine.{name}": (
            (*own, f"{SHARED}::test_schedules"),
            (TENANTS, ENGINE, *(f"tests/runtime/test_{name}.py" for name in (
                "prompt_lookup", "prefix_cache", "runtime_errors"))))
        for name, own in (("loop", ("tests/runtime/test_loop.py",)), ("batch", ("tests/runtime/test_batch.py",)),
                          ("member", ()))},
    "runtime.engine.engine": (("tests/runtime/test_engine_limits.py",),
                              (TENANTS, ENGINE, "tests/runtime/test_types.py")),
    "runtime.engine.submission": ((), ("tests/runtime/test_submission.py", ENGINE, "tests/runtime/test_types.py")),
    "runtime.engine.tenants": (tuple(f"{TENANTS}::{name}" for name in (
        "test_who_may_begin", "test_who_reads_short_chunks",
        "test_chunks_stay_short_for_some_calls_after_another_tenant_has_waited",
        "test_debts_are_paid_in_rounds_and_nothing_is_owed_to_nobody", "test_tokens_of_a_minute",
        "test_rounds_are_as_many_as_give_one_tenant_a_turn", "test_a_tenant_is_forgotten_when_its_tokens_are_back",
        "test_a_tenant_has_one_place_of_a_queue_that_others_fill",
        "test_a_tenants_waiting_rows_are_counted_beside_those_that_may_run", "test_no_tenant_fills_the_queue",
        "test_a_tenant_that_cannot_be")), (TENANTS,)),
    "serve.keys": (("tests/serve/test_keys.py",), ()),
    "serve.logs": (("tests/serve/test_logs.py", f"{HOSTILE_CLIENTS}::test_no_byte_of_a_request_forges_a_log_line"), ()),
    "serve.bodies": (("tests/serve/test_bodies.py",), ()),
    "serve.connections": (("tests/serve/test_connections.py",), (HOSTILE_CLIENTS,)),
    "evaluate.experiment": ((), ("tests/evaluate/test_experiment.py",)),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.mutation", description=__doc__)
    parser.add_argument("modules", nargs="*", choices=[*TESTS, []], metavar="MODULE", help=", ".join(TESTS))
    parser.add_argument("--json", type=Path, default=ROOT / "mutants.json", help="where results are kept")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after this long; go on next time")
    arguments = parser.parse_args()
    results = json.loads(arguments.json.read_text()) if arguments.json.exists() else {}
    deadline = time.monotonic() + 60 * arguments.minutes
    set_environment()
    for name in arguments.modules or TESTS:
        for _ in try_module(name, results):
            arguments.json.write_text(json.dumps(results, indent=1) + "\n")
            if time.monotonic() > deadline:
                break
    print_table(results)


def source_of(name: str) -> Path:
    return (ROOT / "chameleon_deploy" / name.replace(".", "/")).with_suffix(".py")


def try_module(name: str, results: dict[str, Any]) -> Iterator[None]:
    """Try every mutant of a module that is not known to be killed. Yields after each."""
    file = source_of(name)
    source = file.read_text()
    digest, everything = hashlib.sha256(source.encode()).hexdigest(), mutants(source)
    if results.get(name, {}).get("sha256") != digest:
        results[name] = {"sha256": digest, "mutants": len(everything), "killed": [], "survived": {}}
    result = results[name]
    left = {mutant.number: mutant for mutant in everything if mutant.number not in result["killed"]}

    def note(number: int, outcome: Outcome) -> None:
        if outcome in ("survived", "undecided"):
            return
        if outcome == "endless":  # to be looked at: a machine that is too busy may be the reason
            print(f"{name}:{left[number].line}: {left[number].text} (does not end)", flush=True)
        result["killed"].append(number)
        result["survived"].pop(str(number), None)
        del left[number]

    run = set[int]()  # those that a test runs
    units, others = TESTS[name]
    for tests, options in ((units, ("--noconftest",)), ((PREPARE, *others) if others else (), ())):
        if not left or not tests:
            continue
        if tests is not units:
            import_heavy()
        serving = serve(tests, file, list(left.values()), options)
        records = next(serving)
        decided = set[int]()
        for number, outcome in serving:
            note(number, outcome)
            decided |= {number} if outcome == "survived" else set()
            yield
        for number, mutant in list(left.items()):
            chosen = tests_of(mutant, records)
            run |= {number} if chosen else set()
            # What units have not noticed in a fork of their server, the other tests may.
            if chosen and number not in decided and not (tests is units and others and mutant.is_function):
                note(number, try_anew([*options, *chosen], f"chameleon_deploy.{name}", file, mutant, records))
                yield
    for number, mutant in left.items():
        where = f"{name}:{mutant.line}: {mutant.text}{'' if number in run else ' (no test runs it)'}"
        result["survived"][str(number)] = where
        print(where, flush=True)
    yield


def print_table(results: dict[str, Any]) -> None:
    print(f"{'module':28}{'mutants':>8}{'tried':>8}{'killed':>8}{'share':>8}")
    total = [0, 0, 0]
    for name, result in results.items():
        row = [result["mutants"], len(result["killed"]) + len(result["survived"]), len(result["killed"])]
        total = [a + b for a, b in zip(total, row, strict=True)]
        _print_row(name, row)
    _print_row("all", total)


def _print_row(name: str, row: list[int]) -> None:
    print(f"{name:28}{row[0]:8}{row[1]:8}{row[2]:8}{row[2] / max(row[1], 1):8.1%}")


if __name__ == "__main__":
    main()
