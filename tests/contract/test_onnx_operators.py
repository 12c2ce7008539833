"""Graphs that export never writes are refused before ONNX Runtime sees them; hostile.json has more of them."""

from __future__ import annotations

import contextlib
import shutil
import tracemalloc
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from chameleon_deploy.contract.bundle import open_bundle
from chameleon_deploy.contract.onnx_operators import (
    MAX_COPIES,
    MAX_EMBEDDED_BYTES,
    MAX_FILE_BYTES,
    MAX_VALUES,
    check_graph_file,
    check_model,
)
from chameleon_deploy.errors import GraphError
from tests.damage import reseal
from tests.shared_data import DATA, good_bundle

GRAPHS = sorted((DATA / "bundles").glob("*/*.onnx"))
SIZES = {"weights.bin": 2**20}


def _refused(data: bytes, sizes: Mapping[str, int] = SIZES) -> str:
    with pytest.raises(GraphError) as caught:
        check_model(data, sizes)
    return str(caught.value)


def _model_with(tensor: TensorProto) -> bytes:
    return bytes(helper.make_model(helper.make_graph([], "g", [], [], [tensor])).SerializeToString())


def test_every_graph_that_export_wrote_passes() -> None:
    for graph in GRAPHS:
        check_graph_file(graph, SIZES)


def test_a_large_constant_in_the_file_is_refused() -> None:
    def tensor(elements: int) -> TensorProto:
        return helper.make_tensor("w", TensorProto.UINT8, [elements], bytes(elements), raw=True)

    check_model(_model_with(tensor(MAX_EMBEDDED_BYTES - 100)), SIZES)
    assert "in the graph's file" in _refused(_model_with(tensor(MAX_EMBEDDED_BYTES)))
    node = helper.make_node("Constant", [], ["c"], value_ints=[1] * MAX_EMBEDDED_BYTES)
    assert "attribute" in _refused(helper.make_model(helper.make_graph([node], "g", [], [])).SerializeToString())


def test_external_data_has_a_size_to_fit() -> None:
    tensor = TensorProto(name="w", dims=[2**18], data_type=TensorProto.FLOAT, data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="weights.bin")
    check_model(_model_with(tensor), SIZES)
    tensor.dims[0] = 2**22
    assert "more elements" in _refused(_model_with(tensor))
    tensor.dims[0] = -1
    assert "more elements" in _refused(_model_with(tensor))
    tensor.external_data[0].value = "/etc/passwd"
    assert "does not list" in _refused(_model_with(tensor))


WEIGHTS = TensorProto(name="w", dims=[2**20], data_type=TensorProto.INT8, data_location=TensorProto.EXTERNAL)
WEIGHTS.external_data.add(key="location", value="weights.bin")
SCALE = helper.make_tensor("s", TensorProto.FLOAT16, [], [1.0])
FOLDED: dict[str, tuple[list[str], dict[str, Any], int]] = {  # inputs, attributes, and MiB of 2**20 elements of 8 bits
    "Cast to double": (["w"], {"to": TensorProto.DOUBLE}, 8),
    "Cast to text": (["w"], {"to": TensorProto.STRING}, 32),
    "Cast to uint8": (["w"], {"to": TensorProto.UINT8}, 1),
    "Transpose": (["w"], {}, 1),
    "DequantizeLinear": (["w", "s"], {}, 2),
    "BitwiseXor": (["w", "s"], {}, 1),
}


@pytest.mark.parametrize("name", FOLDED)
@pytest.mark.parametrize("in_a_branch", [False, True])
def test_constants_are_bounded_by_the_size_of_the_bundle(name: str, in_a_branch: bool) -> None:
    """What is folded is added to the initializers, up to the bound and not a byte beyond it."""
    inputs, attributes, folded = FOLDED[name]
    nodes = [helper.make_node(name.split()[0], inputs, [f"y{i}"], **attributes) for i in range(8)]
    if in_a_branch:
        branch = helper.make_graph(nodes, "branch", [], [])
        nodes = [helper.make_node("If", ["c"], ["z"], then_branch=branch)]
    condition = helper.make_tensor_value_info("c", TensorProto.BOOL, [])
    data = helper.make_model(helper.make_graph(nodes, "g", [condition], [], [WEIGHTS, SCALE])).SerializeToString()
    least = -(-((1 + 8 * folded) * 2**20 + 2) // MAX_COPIES)  # 2 bytes of the scale
    check_model(data, {"weights.bin": 2**20, "other": least - 2**20})
    assert "one constant too many" in _refused(data, {"weights.bin": 2**20, "other": least - 2**20 - 1})


def test_two_constants_cannot_widen_each_other() -> None:
    row, column = (helper.make_tensor(name, TensorProto.UINT8, shape, [1] * 256)
                   for name, shape in (("r", [1, 256]), ("c", [256, 1])))  # fmt: skip
    node = helper.make_node("BitwiseXor", ["r", "c"], ["y"])
    model = helper.make_model(helper.make_graph([node], "g", [], [], [row, column]))
    assert "more than one element" in _refused(model.SerializeToString())


def test_the_file_and_its_messages_are_bounded(tmp_path: Path) -> None:
    (tmp_path / "large.onnx").write_bytes(b"\0" * (MAX_FILE_BYTES + 1))
    with pytest.raises(GraphError, match="more than"):
        check_graph_file(tmp_path / "large.onnx", {})
    tracemalloc.start()
    assert "fields" in _refused(b"\x42\x00" * (MAX_VALUES + 1))
    assert tracemalloc.get_traced_memory()[1] < 64 * 2**20
    tracemalloc.stop()


def test_a_graph_that_no_provider_of_this_machine_runs_is_read_too(tmp_path: Path) -> None:
    shutil.copytree(good_bundle("lora_masked"), tmp_path / "b")
    (tmp_path / "b" / "chooser.onnx").write_bytes(b"\x3a\x02\x0a")
    reseal(tmp_path / "b")
    with pytest.raises(GraphError, match=r"chooser\.onnx"):
        open_bundle(tmp_path / "b")


@settings(max_examples=2000, deadline=2000)
@given(st.binary(max_size=300))
@example(b"\xff" * 20)
@example(b"\x3a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01")
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    _read_or_refuse(data)


@settings(max_examples=500, deadline=2000)
@given(st.sampled_from(GRAPHS), st.lists(st.tuples(st.integers(0, 2**16), st.integers(0, 255)), max_size=4), st.data())
def test_a_damaged_graph_is_read_or_refused(graph: Path, changes: list[tuple[int, int]], data: st.DataObject) -> None:
    content = bytearray(graph.read_bytes())
    for place, value in changes:
        content[place % len(content)] = value
    start, end = sorted(data.draw(st.tuples(st.integers(0, len(content)), st.integers(0, len(content)))))
    _read_or_refuse(bytes(content[:start] + content[end:]) if data.draw(st.booleans()) else bytes(content))


def _read_or_refuse(data: bytes) -> None:
    with contextlib.suppress(GraphError):
        check_model(data, SIZES)
