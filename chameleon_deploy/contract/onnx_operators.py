"""Check the bytes of a graph before ONNX Runtime opens it.

ONNX Runtime executes part of a graph while it opens it: nodes with constant inputs are folded. A reader therefore
refuses beforehand what `export` never writes: other operators, functions, large constants in the graph's own file, and
nodes that make a constant of another size from constants. The fields are those of
https://github.com/onnx/onnx/blob/v1.17.0/onnx/onnx.proto, the encoding is
https://protobuf.dev/programming-guides/encoding.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from chameleon_deploy.errors import GraphError

STANDARD = """Abs Add And ArgMax Cast Concat Constant DequantizeLinear Div Equal Expand Gather GatherElements GatherND
    Gelu Gemm Greater If IsInf IsNaN LayerNormalization LessOrEqual LogSoftmax MatMul Max Min Mod Mul Or Pow
    QuantizeLinear Range Reciprocal ReduceLogSumExp ReduceMax ReduceMean Relu Reshape Shape Sigmoid Slice Softmax Split
    Sqrt Squeeze Sub Transpose Unsqueeze Where"""
CONTRIB = "GroupQueryAttention MatMulIntegerToFloat RotaryEmbedding"
# By domain, exactly the operators that `export` writes, which a test compares.
OPERATORS = {"": frozenset(STANDARD.split()), "com.microsoft": frozenset(CONTRIB.split())}
SIZE_PRESERVING = frozenset(("Cast", "DequantizeLinear", "Transpose"))  # of constants, which may be folded
MAX_FILE_BYTES = 8 * 2**20  # 126 layers of a Llama in int8 take 4 MB
MAX_EMBEDDED_BYTES = 2**20  # of one tensor or attribute; larger ones are in weights.bin
MAX_DEPTH = 4  # of graphs in graphs
MAX_VALUES = 2**16  # of one message, which bounds the memory of parsing it

Value = int | memoryview
Message = dict[int, list[Value]]

# The fields that may occur in each message, with their wire types.
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
MODEL = dict.fromkeys((2, 3, 4, 6, 7, 8, 14), (BYTES,)) | dict.fromkeys((1, 5), (VARINT,))
OPSET = {1: (BYTES,), 2: (VARINT,)}
GRAPH = dict.fromkeys((1, 2, 5, 10, 11, 12, 13, 16), (BYTES,))
NODE = dict.fromkeys((1, 2, 3, 4, 5, 6, 7, 9), (BYTES,))
ATTRIBUTE = dict.fromkeys((1, 4, 5, 6, 9, 13), (BYTES,)) | {
    2: (FIXED32,), 3: (VARINT,), 7: (FIXED32, BYTES), 8: (VARINT, BYTES), 20: (VARINT,),
}  # fmt: skip
TENSOR = dict.fromkeys((6, 8, 9, 12, 13, 16), (BYTES,)) | {
    1: (VARINT, BYTES), 2: (VARINT,), 4: (FIXED32, BYTES), 5: (VARINT, BYTES), 7: (VARINT, BYTES),
    10: (FIXED64, BYTES), 11: (VARINT, BYTES), 14: (VARINT,),
}  # fmt: skip
ENTRY = {1: (BYTES,), 2: (BYTES,)}
VALUE_INFO = dict.fromkeys((1, 2, 3, 4), (BYTES,))


@dataclass(frozen=True)
class Scope:
    """The names that one graph has defined so far, and those of them whose values are constants."""

    names: set[str]
    constants: set[str]


Scopes = tuple[Scope, ...]  # of a graph and of those around it, outermost first


def check_graph_file(file: Path, sizes: Mapping[str, int]) -> None:
    """Refuse a graph file that `export` cannot have written.

    sizes  bytes of every file that the bundle lists, by name: external data may be in those alone

    Raises GraphError.
    """
    if file.stat().st_size > MAX_FILE_BYTES:
        raise GraphError(f"{file}: a graph of more than {MAX_FILE_BYTES} bytes: weights belong in weights.bin")
    try:
        check_model(file.read_bytes(), sizes)
    except GraphError as error:
        raise GraphError(f"{file}: {error}: export again") from None


def check_model(data: bytes, sizes: Mapping[str, int]) -> None:
    """Check the bytes of a ModelProto in the same way."""
    model = _message(memoryview(data), MODEL, "the model")
    for opset in model.get(8, ()):
        _operators_of(_text(_message(opset, OPSET, "an opset"), 1))
    if len(model.get(7, ())) != 1:
        raise GraphError("it is not one ONNX graph")
    _check_graph(model[7][0], sizes, ())


def _check_graph(data: Value, sizes: Mapping[str, int], scopes: Scopes) -> None:
    if len(scopes) >= MAX_DEPTH:
        raise GraphError(f"graphs in graphs, more than {MAX_DEPTH} deep")
    graph = _message(data, GRAPH, "a graph")
    constants = {_check_tensor(tensor, sizes) for tensor in graph.get(5, ())}
    inputs = {_text(_message(value, VALUE_INFO, "an input"), 1) for value in graph.get(11, ())}
    scopes = (*scopes, Scope(constants | inputs, constants))
    for node in graph.get(1, ()):
        _check_node(_message(node, NODE, "a node"), sizes, scopes)


def _check_node(node: Message, sizes: Mapping[str, int], scopes: Scopes) -> None:
    operator, written = _operator(node), _texts(node, 2)
    read = [name for name in _texts(node, 1) if name]  # an optional input is left out by an empty name
    for name in read:
        if not any(name in scope.names for scope in scopes):
            raise GraphError(f"{operator} reads {_shown(name)}, which nothing before it gives")
    if all(any(name in scope.constants for scope in scopes) for name in read):
        if operator != "Constant" and operator not in SIZE_PRESERVING:
            raise GraphError(f"{operator} has constant inputs only")
        scopes[-1].constants.update(written)
    for attribute in node.get(5, ()):
        _check_attribute(attribute, sizes, scopes)
    scopes[-1].names.update(written)


def _check_attribute(data: Value, sizes: Mapping[str, int], scopes: Scopes) -> None:
    attribute = _message(data, ATTRIBUTE, "an attribute")
    for graph in attribute.get(6, ()):
        _check_graph(graph, sizes, scopes)
    for tensor in attribute.get(5, ()):
        _check_tensor(tensor, sizes)
    if 6 not in attribute and len(_bytes(data)) > MAX_EMBEDDED_BYTES:
        raise GraphError(f"an attribute of more than {MAX_EMBEDDED_BYTES} bytes")


def _check_tensor(data: Value, sizes: Mapping[str, int]) -> str:
    """Check where a tensor's values are and that there are enough for its dimensions.  -> its name"""
    tensor = _message(data, TENSOR, "a tensor")
    name, size = _text(tensor, 8), len(_bytes(data))
    if size > MAX_EMBEDDED_BYTES:
        raise GraphError(f"{_shown(name)} is a constant of more than {MAX_EMBEDDED_BYTES} bytes in the graph's file")
    if 13 in tensor or _number(tensor, 14):
        size = _external_size(tensor, name, sizes)
    elements = 1
    for dimension in _numbers(tensor, 1):
        elements *= dimension
        if max(elements, dimension) > 2 * size:  # the smallest elements have 4 bits
            raise GraphError(f"{_shown(name)} has more elements than stored values")
    return name


def _external_size(tensor: Message, name: str, sizes: Mapping[str, int]) -> int:
    entries = [_message(entry, ENTRY, "an external data entry") for entry in tensor.get(13, ())]
    locations = [_text(entry, 2) for entry in entries if _text(entry, 1) == "location"]
    if len(locations) != 1 or locations[0] not in sizes:
        raise GraphError(f"{_shown(name)} has its data in {locations}, which the bundle does not list")
    return sizes[locations[0]]


def _operator(node: Message) -> str:
    domain, operator = _text(node, 7), _text(node, 4)
    if operator not in _operators_of(domain):
        raise GraphError(f"operator {_shown(operator)} of domain {_shown(domain)} is none that export writes")
    return operator


def _operators_of(domain: str) -> frozenset[str]:
    if domain not in OPERATORS:
        raise GraphError(f"domain {_shown(domain)} is none that export uses")
    return OPERATORS[domain]


def _message(data: Value, fields: Mapping[int, tuple[int, ...]], what: str) -> Message:
    """Return the values of every field, in order."""
    message: Message = {}
    for count, (number, wire_type, value) in enumerate(_fields(_bytes(data))):
        if count == MAX_VALUES:
            raise GraphError(f"{what} has more than {MAX_VALUES} fields")
        if wire_type not in fields.get(number, ()):
            raise GraphError(f"{what} has a field {number} of wire type {wire_type}, which export does not write")
        message.setdefault(number, []).append(value)
    return message


def _fields(data: memoryview) -> Iterator[tuple[int, int, Value]]:
    """Yield number, wire type and value of every field: an int for VARINT, else its bytes."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, wire_type = key >> 3, key & 7
        if wire_type == VARINT:
            value, at = _varint(data, at)
            yield number, wire_type, value
            continue
        if wire_type == BYTES:
            size, at = _varint(data, at)
        elif wire_type in (FIXED32, FIXED64):
            size = 4 if wire_type == FIXED32 else 8
        else:
            raise GraphError(f"it is not protobuf: wire type {wire_type}")
        if size > len(data) - at:
            raise GraphError("it ends in the middle of a field")
        yield number, wire_type, data[at : at + size]
        at += size


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    """Return the number, of at most 64 bits, and the position after it."""
    value = 0
    for i, byte in enumerate(data[at : at + 10]):
        value |= (byte & 0x7F) << 7 * i
        if byte < 0x80:
            if value >= 2**64:
                break
            return value, at + i + 1
    raise GraphError("it is not protobuf: a number does not end")


def _numbers(message: Message, field: int) -> Iterator[int]:
    """Return the numbers of a repeated field, packed or not."""
    for value in message.get(field, ()):
        if isinstance(value, int):
            yield value
            continue
        at = 0
        while at < len(value):
            number, at = _varint(value, at)
            yield number


def _number(message: Message, field: int) -> int:
    return next(reversed(list(_numbers(message, field))), 0)


def _texts(message: Message, field: int) -> list[str]:
    # Bytes that are not UTF-8 stay distinct.
    return [str(_bytes(value), "utf-8", "surrogateescape") for value in message.get(field, ())]


def _text(message: Message, field: int) -> str:
    """Return the last value, as protobuf does for a field that occurs twice; empty if there is none."""
    return next(reversed(_texts(message, field)), "")


def _bytes(value: Value) -> memoryview:
    if isinstance(value, int):
        raise GraphError("it is not protobuf: a number where bytes belong")
    return value


def _shown(name: str) -> str:
    return ascii(name[:60])
