"""The quality of an engine: exact for known logits, and no engine's failure is hidden."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from scipy.special import log_softmax

from chameleon_deploy import Runtime
from chameleon_deploy.bench.peers import Peer, Rows
from chameleon_deploy.bench.peers.bundle import Bundle, FullLogits
from chameleon_deploy.bench.quality import Quality, measure_quality, text_windows
from chameleon_deploy.errors import InputError
from chameleon_deploy.reference.checkpoint import Checkpoint


class _Engine:
    """An engine that gives what a function makes of the reference's logits."""

    size, is_ablation = 7, False

    def __init__(self, name: str, checkpoint: Checkpoint, change: Callable[[Any], Any]) -> None:
        self.name, self._checkpoint, self._change = name, checkpoint, change

    def logits(self, ids: Sequence[int]) -> Any:
        return self._change(_reference(self._checkpoint, ids))


@torch.no_grad()
def _reference(checkpoint: Checkpoint, ids: Sequence[int]) -> Any:
    return checkpoint.trunk.causal_lm(torch.tensor([ids])).logits[0].numpy().copy()


def _measure(engines: list[Any], checkpoint: Checkpoint, windows: Rows) -> dict[str, Quality | str]:
    return measure_quality(cast("list[Peer]", engines), checkpoint.trunk, windows, lambda *_: None)


@pytest.fixture(scope="module")
def windows(mini: Checkpoint) -> Rows:
    return text_windows(mini.trunk, [], 3, 40)


def test_figures_of_known_logits(mini: Checkpoint, windows: Rows) -> None:
    """Halved logits: the KL divergence and the perplexity by their definitions, the best token unchanged."""
    found = _measure([_Engine("half", mini, lambda logits: logits / 2)], mini, windows)["half"]
    assert isinstance(found, Quality)
    kl, nll = [], []
    for ids in windows:
        logits = _reference(mini, ids).astype(np.float64)
        p, q = log_softmax(logits, 1), log_softmax(logits / 2, 1)
        kl += (np.exp(p) * (p - q)).sum(1).tolist()
        nll += (-q[np.arange(len(ids) - 1), ids[1:]]).tolist()
    assert found.mean_kl == pytest.approx(np.mean(kl))
    assert found.p999_kl == pytest.approx(np.quantile(kl, 0.999))
    assert found.perplexity == pytest.approx(np.exp(np.mean(nll)))
    assert (found.top1, found.size) == (1, 7)
    assert found.reference_perplexity != pytest.approx(found.perplexity, rel=1e-4)


def test_a_fault_in_the_logits_is_seen(mini: Checkpoint, windows: Rows) -> None:
    """The logits of the next position, and two tokens exchanged, are far from right."""

    def exchanged(logits: Any) -> Any:
        logits[:, [5, int(logits[0].argmax())]] = logits[:, [int(logits[0].argmax()), 5]]
        return logits

    engines = [_Engine("right", mini, lambda logits: logits),
               _Engine("next", mini, lambda logits: np.roll(logits, 1, axis=0)),
               _Engine("exchanged", mini, exchanged)]  # fmt: skip
    found = _measure(engines, mini, windows)
    right, *wrong = found.values()
    assert isinstance(right, Quality)
    assert (right.mean_kl, right.top1) == (0, 1)
    for quality in wrong:
        assert isinstance(quality, Quality)
        assert quality.mean_kl > 1e-5  # the random model is nearly uniform
        assert quality.top1 < 1


def test_an_engine_that_fails_is_named_and_the_others_go_on(mini: Checkpoint, windows: Rows) -> None:
    def fail(logits: Any) -> Any:
        raise RuntimeError("no logits")

    found = _measure([_Engine("bad", mini, fail), _Engine("good", mini, lambda logits: logits)], mini, windows)
    assert found["bad"] == "RuntimeError: no logits"
    assert isinstance(found["good"], Quality)


def test_a_bundle_equals_its_base_and_its_ablations_are_left_out(
    runtime: Runtime, mini: Checkpoint, windows: Rows
) -> None:
    found = _measure([Bundle(runtime), FullLogits(runtime)], mini, windows)
    assert list(found) == ["bundle"]
    quality = found["bundle"]
    assert isinstance(quality, Quality)
    assert abs(quality.mean_kl) < 1e-7
    assert quality.perplexity == pytest.approx(quality.reference_perplexity, rel=1e-5)
    assert quality.size == sum(file.size for file in runtime.manifest.files.values())


def test_windows_are_spread_over_the_text(mini: Checkpoint, tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("\n\n".join(f"Paragraph {i} of a text." for i in range(200)))
    ids = mini.trunk.tokenizer.encode(file.read_text(), add_special_tokens=False).ids
    stride = len(ids) // 4
    assert text_windows(mini.trunk, [file], 4, 30) == [ids[i * stride : i * stride + 30] for i in range(4)]
    with pytest.raises(InputError, match="windows of 30 need"):
        text_windows(mini.trunk, [file], len(ids), 30)
