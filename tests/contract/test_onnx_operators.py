"""Graphs that export never writes are refused before ONNX Runtime sees them; hostile.json has more of them."""

from __future__ import annotations

import contextlib
import shutil
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from chameleon_deploy.contract.bundle import open_bundle
from chameleon_deploy.contract.onnx_operators import (
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


def _refused(data: bytes) -> str:
    with pytest.raises(GraphError) as caught:
        check_model(data, SIZES)
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
