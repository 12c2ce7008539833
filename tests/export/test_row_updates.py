"""Updates of the CPU's decoder: each row's own, with the same bits beside any others, and none where no row has one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from chameleon_deploy.contract.bundle import FloatArray, Precision, open_bundle
from chameleon_deploy.contract.manifest import in_head
from chameleon_deploy.export.exporter import export_bundle
from chameleon_deploy.export.passes.row_updates import choose_updates
from chameleon_deploy.reference.adapters import load_adapted
from chameleon_deploy.runtime import Runtime
from chameleon_deploy.runtime.decode.shared_cache import SharedCacheDecoder
from chameleon_deploy.runtime.factors import FactorSets, RowFactors, no_factors, stack_sets
from tests.devices import on_cpu

BUNDLES: dict[str, tuple[str, Precision, list[str]]] = {
    "gpt2": ("mini_path", "fp32", ["all"]),
    "llama": ("llama_path", "fp32", ["all"]),
    "int8": ("llama_path", "int8", ["all"]),
    "int4": ("llama_path", "int4", ["attention"]),
}
PROMPTS = np.random.default_rng(0).integers(1, 512, (5, 9)).tolist()
# Of five rows: sets in order, out of order, with rows apart, without rows, and one set for all.
CHOICES = [[0, 1, 2, 3, 4], [4, 2, 0, 3, 1], [1, 0, 1, 1, 0], [3, 0, 3, 0, 3], [2, 2, 2, 2, 2], [0, 0, 0, 0, 0]]


@pytest.fixture(scope="module", params=BUNDLES)
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    checkpoint, precision, layers = BUNDLES[request.param]
    base = request.getfixturevalue(checkpoint) / "base"
    out = tmp_path_factory.mktemp("updates") / "bundle"
    export_bundle(load_adapted(str(base), {}, adaptable=layers, max_rank=4), out, precision=precision)
    return out


@pytest.fixture(scope="module")
def runtime(path: Path) -> Runtime:
    return on_cpu(open_bundle(path), "decoder_cpu")


def sets_of(runtime: Runtime, count: int, factor: float = 1.0) -> FactorSets:
    """Return sets of random values times a factor in the trunk, and of zeros in the head."""
    random = np.random.default_rng(1)
    return FactorSets({
        name: (0.0 if in_head(name) else factor) * random.normal(0, 0.1, (count, 3, width)).astype(np.float32)
        for name, width in runtime.manifest.adaptation.factor_widths.items()
    })  # fmt: skip


def read(runtime: Runtime, sets: FactorSets, factor_ids: Sequence[int], rows: Sequence[int]) -> tuple[Any, FloatArray]:
    """Return keys and values of some prompts and of a step after them [layers * 2, rows, heads, tokens, head_dim], and
    the step's logits.
    """
    assert isinstance(runtime.decoder, SharedCacheDecoder)
    factors = RowFactors(sets, np.array(factor_ids, np.int64))
    prompts = [PROMPTS[row] for row in rows]
    slots = runtime.decoder.slots(len(rows), len(PROMPTS[0]) + 1)
    slots.prefill(0, prompts, factors)
    logits = slots.step([7] * len(rows), factors).copy()
    return slots._cache.copy(), logits


@pytest.mark.parametrize("factor_ids", CHOICES)
def test_every_row_has_its_own_set(runtime: Runtime, factor_ids: list[int]) -> None:
    sets, rows = sets_of(runtime, 5), range(5)
    keys, logits = read(runtime, sets, factor_ids, rows)
    steps = keys.dtype == np.int8
    for row in rows:
        own = sets[np.array([factor_ids[row]])]
        found, alone = read(runtime, own, [0], [row])
        apart, other = read(runtime, sets[np.array([(factor_ids[row] + 1) % 5])], [0], [row])
        nearest = np.abs(other - alone).max()
        assert nearest > 0.1  # no set can be taken for another
        assert np.abs(logits[row] - alone[0]).max() < (0.2 * nearest if steps else 2e-4)
        difference = np.abs(keys[:, row].astype(np.float32) - found[:, 0]).mean()
        assert difference < (0.1 if steps else 1e-5) < np.abs(apart.astype(np.float32) - found).mean()


def test_a_row_has_the_same_bits_beside_any_sets(runtime: Runtime) -> None:
    """In calls of one shape. Where no row has an update the others add zeros."""
    sets, nothing = sets_of(runtime, 3), no_factors(runtime.manifest.adaptation)
    idle, _ = read(runtime, nothing, [0] * 5, range(5))
    stack = stack_sets([sets, nothing])
    mixed, _ = read(runtime, stack, [3, 0, 3, 1, 2], range(5))
    other, _ = read(runtime, stack, [3, 0, 3, 0, 0], range(5))
    shared, _ = read(runtime, sets[np.array([0])], [0] * 5, range(5))
    for row in (0, 2):
        assert np.array_equal(idle[:, row], mixed[:, row])
        assert np.array_equal(idle[:, row], other[:, row])
    assert np.array_equal(mixed[:, 1], other[:, 1])
    assert not np.array_equal(mixed[:, 3], other[:, 3])
    assert not np.array_equal(idle[:, 1], shared[:, 1])


def test_no_product_of_an_update_runs_where_no_row_has_one(runtime: Runtime) -> None:
    """A product with factors that are NaN would be seen."""
    base, logits = read(runtime, no_factors(runtime.manifest.adaptation), [0, 0], [0, 1])
    poison = sets_of(runtime, 1, float("nan"))
    keys, untouched = read(runtime, FactorSets(poison.tensors, updates_nothing=True), [0, 0], [0, 1])
    assert keys.tobytes() == base.tobytes()
    assert untouched.tobytes() == logits.tobytes()
    assert np.isnan(read(runtime, poison, [0, 0], [0, 1])[1]).all()


def test_the_products_of_updates_are_in_branches(path: Path, runtime: Runtime) -> None:
    portable, decoder = (ir.load(path / f"{name}.onnx") for name in ("decoder", "decoder_cpu"))
    targets = [target.name for target in runtime.manifest.adaptation.targets if target.name != "lm_head"]
    choices = [node for node in decoder.graph if str(node.outputs[0].name).startswith("updates.")]
    choices = [node for node in choices if node.op_type == "If"]
    inputs_of_layer = 4 if any("mlp" in name for name in targets) else 2
    assert len(choices) == inputs_of_layer * runtime.manifest.model.num_layers
    for node in choices:
        assert {inner.op_type for inner in node.attributes["then_branch"].as_graph()} == {"Constant"}
    factors = {str(value.name): value for value in decoder.graph.inputs if ".lora_" in str(value.name)}
    for target in targets:
        for name, once in ((f"{target}.lora_A", "Transpose"), (f"{target}.lora_B", "MatMul")):
            readers = [node for node, _ in factors[name].uses()]
            assert sorted(node.op_type for node in readers) == sorted((once, "Reshape"))  # one set, several sets
            assert all(node.graph is not decoder.graph for node in readers)
    assert not [node for node in portable.graph if node.op_type == "If"]
    assert choose_updates(portable) == 0  # its factors have an axis of sets
