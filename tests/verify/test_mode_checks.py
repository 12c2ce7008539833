"""verify: every mode is gated in every precision, so that each fault of one mode alone is caught in each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, get_args

import numpy as np
import pytest

import chameleon_deploy
from chameleon_deploy import Adapt, Runtime
from chameleon_deploy.contract.bundle import Mode, Precision
from chameleon_deploy.reference.checkpoint import Checkpoint
from chameleon_deploy.reference.inference import RowLogits
from chameleon_deploy.runtime.factors import RowFactors
from chameleon_deploy.verify.checkpoint_checks import check_mode
from chameleon_deploy.verify.gates import GATES
from chameleon_deploy.verify.run import verification_rows
from tests.conftest import Exported

Missed = Callable[[Runtime, Mode], set[str]]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)


@pytest.fixture(scope="module")
def missed(tiny: Checkpoint) -> Missed:
    reference, rows = RowLogits(tiny), verification_rows(tiny)[:8]

    def of(runtime: Runtime, mode: Mode) -> set[str]:
        checks = check_mode(runtime, reference, rows, GATES[runtime.manifest.precision], mode)
        return {check.name.removeprefix(f"mode {mode}: ") for check in checks if not check.passed}

    return of


@pytest.fixture(scope="module", params=PRECISIONS)
def runtime(request: pytest.FixtureRequest, exported: Exported) -> Runtime:
    return chameleon_deploy.load(exported("tiny", request.param), threads=1)


@pytest.mark.parametrize("mode", get_args(Mode))
def test_a_right_bundle_passes(mode: Mode, runtime: Runtime, missed: Missed) -> None:
    assert missed(runtime, mode) == set()


def test_factors_of_another_cluster(runtime: Runtime, missed: Missed, monkeypatch: pytest.MonkeyPatch) -> None:
    right = runtime.sources._factors_of_centroids
    shifted = lambda: right()[np.roll(np.arange(len(right())), 1)]  # noqa: E731
    monkeypatch.setattr(runtime.sources, "_factors_of_centroids", shifted)
    assert {"factors, relative difference", "update, relative difference"} <= missed(runtime, "centroid")


def test_factors_of_the_caller_that_are_ignored(
    runtime: Runtime, missed: Missed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime.sources, "_static_factors", lambda factors: runtime.sources._no_factors)
    assert {"factors, relative difference", "update, relative difference"} <= missed(runtime, "static")


def _next_sets(factors: RowFactors) -> RowFactors:
    return replace(factors, factor_ids=(factors.factor_ids + 1) % len(factors.sets))


def _tenants_swapped(right: Callable[..., Any]) -> Callable[..., Any]:
    def adapt(rows: Any, options: Adapt) -> Any:
        adaptation = right(rows, options)
        return replace(adaptation, factors=_next_sets(adaptation.factors))

    return adapt


def _tenants_ignored(right: Callable[..., Any]) -> Callable[..., Any]:
    """The factors of all tenants together are close to each one's, and the logits of int8 do not tell them apart."""

    def adapt(rows: Any, options: Adapt) -> Any:
        return right(rows, Adapt("cohort"))

    return adapt


@pytest.mark.parametrize("fault", [_tenants_swapped, _tenants_ignored])
def test_factors_of_another_tenant(
    fault: Callable[[Any], Any],
    runtime: Runtime,
    missed: Missed,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(runtime.sources, "adapt", fault(runtime.sources.adapt))
    assert "factors, relative difference" in missed(runtime, "tenant")


@pytest.mark.parametrize("mode", ["none", "static", "centroid", "request", "tenant"])
def test_scores_that_ignore_the_mode(
    mode: Mode, runtime: Runtime, missed: Missed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`adapt` is right, and `score` adapts in the default mode."""
    right = runtime.score

    monkeypatch.setattr(runtime, "score", lambda rows, **arguments: right(rows))
    assert "scores against scores with the factors of adapt" in missed(runtime, mode)


def test_a_decoder_that_takes_the_next_set(runtime: Runtime, missed: Missed, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = runtime.decoder
    for name in ("all_logits", "token_logprobs"):
        right = getattr(decoder, name)

        def wrong(rows: Any, factors: RowFactors, right: Any = right) -> Any:
            return right(rows, _next_sets(factors))

        monkeypatch.setattr(decoder, name, wrong)
    assert "update, relative difference" in missed(runtime, "request")
