"""Check the bytes of a graph before ONNX Runtime opens it.

ONNX Runtime executes part of a graph while it opens it: nodes with constant inputs are folded. A reader therefore
refuses beforehand what `export` never writes: other operators, functions, large constants in the graph's own file,
nodes that make a constant of another size from constants, and constants of many times the bundle's size. The fields are
those of https://github.com/onnx/onnx/blob/v1.17.0/onnx/onnx.proto, the encoding is
https://protobuf.dev/programming-guides/encoding.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from chameleon_deploy.errors import GraphError

STANDARD = """Abs Add And ArgMax BitwiseXor Cast Concat Constant CumSum DequantizeLinear Div Equal Expand Gather
    GatherElements GatherND Gelu Gemm Greater If IsInf IsNaN LayerNormalization LessOrEqual LogSoftmax MatMul Max
    Min Mod Mul Or Pow QuantizeLinear Range Reciprocal ReduceLogSumExp ReduceMax ReduceMean Relu Reshape Shape
    Sigmoid Slice Softmax Split Sqrt Squeeze Sub Tanh Transpose Unsqueeze Where"""
CONTRIB = "GroupQueryAttention MatMulIntegerToFloat MatMulNBits RotaryEmbedding"
# By domain, exactly the operators that `export` writes, which a test compares.
OPERATORS = {"": frozenset(STANDARD.split()), "com.microsoft": frozenset(CONTRIB.split())}
# Of constants, which may be folded.
SIZE_PRESERVING = frozenset(("BitwiseXor", "Cast", "DequantizeLinear", "Transpose"))
MAX_FILE_BYTES = 8 * 2**20  # 126 layers of a Llama in int8 take 4 MB, 8 if all take adapters
MAX_EMBEDDED_BYTES = 2**20  # of one tensor or attribute; larger ones are in weights.bin
MAX_DEPTH = 4  # of graphs in graphs
MAX_VALUES = 2**16  # of one message, which bounds the memory of parsing it
# Bytes of a graph's constants, stored and folded, as a multiple of the bundle's size. Weights of a tied head have two
# names; int8 weights may be folded to float32, four times their size, or to another type of 8 bits. Weights of 4 bits
# count as a byte each, are folded to float32 and transposed, 14 times their size with their scales.
MAX_COPIES = 16
# Bytes of an element by TensorProto.DataType; of types that export does not write, at most MAX_WIDTH.
WIDTHS = {
    1: 4, 2: 1, 3: 1, 4: 2, 5: 2, 6: 4, 7: 8, 9: 1, 10: 2, 11: 8, 12: 4, 13: 8, 16: 2,
    17: 1, 18: 1, 19: 1, 20: 1, 21: 1, 22: 1,
}  # fmt: skip
MAX_WIDTH = 32

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
    """The names that one graph has defined so far, and those of them whose values are constants.

    constants  elements of each, and bytes of an element
    """

    names: set[str]
    constants: dict[str, tuple[int, int]]


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
    _GraphChecker(sizes).check_graph(model[7][0])


class _GraphChecker:
    """Checks one graph and those in it, and adds up the bytes of their constants."""

    def __init__(self, sizes: Mapping[str, int]) -> None:
        self._sizes = sizes
        self._scopes: list[Scope] = []  # of a graph and of those around it, outermost first
        self._room = MAX_COPIES * sum(sizes.values())  # bytes that further constants may take

    def check_graph(self, data: Value) -> None:
        if len(self._scopes) >= MAX_DEPTH:
            raise GraphError(f"graphs in graphs, more than {MAX_DEPTH} deep")
        graph = _message(data, GRAPH, "a graph")
        scope = Scope(set(), {})
        for tensor in graph.get(5, ()):
            self._check_tensor(tensor, scope)
        scope.names.update(scope.constants)
        scope.names.update(_text(_message(value, VALUE_INFO, "an input"), 1) for value in graph.get(11, ()))
        self._scopes.append(scope)
        for node in graph.get(1, ()):
            self._check_node(_message(node, NODE, "a node"))
        self._scopes.pop()

    def _check_node(self, node: Message) -> None:
        operator, written = _operator(node), _texts(node, 2)
        read = [name for name in _texts(node, 1) if name]  # an optional input is left out by an empty name
        for name in read:
            if not any(name in scope.names for scope in self._scopes):
                raise GraphError(f"{operator} reads {_shown(name)}, which nothing before it gives")
        constants = [constant for name in read if (constant := self._constant(name))]
        if len(constants) == len(read):
            if operator != "Constant" and operator not in SIZE_PRESERVING:
                raise GraphError(f"{operator} has constant inputs only")
            for name in written:
                self._scopes[-1].constants[name] = self._add(name, *_folded(operator, node, constants))
        for attribute in node.get(5, ()):
            self._check_attribute(attribute)
        self._scopes[-1].names.update(written)

    def _constant(self, name: str) -> tuple[int, int] | None:
        return next((scope.constants[name] for scope in self._scopes[::-1] if name in scope.constants), None)

    def _add(self, name: str, elements: int, width: int) -> tuple[int, int]:
        """Count the bytes of a constant."""
        self._room -= elements * width
        if self._room < 0:
            raise GraphError(
                f"{_shown(name)} is one constant too many: they take more than {MAX_COPIES} times the bundle's size"
            )
        return elements, width

    def _check_attribute(self, data: Value) -> None:
        attribute = _message(data, ATTRIBUTE, "an attribute")
        for graph in attribute.get(6, ()):
            self.check_graph(graph)
        for tensor in attribute.get(5, ()):
            self._check_tensor(tensor, Scope(set(), {}))
        if 6 not in attribute and len(_bytes(data)) > MAX_EMBEDDED_BYTES:
            raise GraphError(f"an attribute of more than {MAX_EMBEDDED_BYTES} bytes")

    def _check_tensor(self, data: Value, scope: Scope) -> None:
        """Check where a tensor's values are and that there are enough for its dimensions."""
        tensor = _message(data, TENSOR, "a tensor")
        name, size = _text(tensor, 8), len(_bytes(data))
        if name in scope.constants:
            raise GraphError(f"{_shown(name)} is there twice")
        if size > MAX_EMBEDDED_BYTES:
            raise GraphError(
                f"{_shown(name)} is a constant of more than {MAX_EMBEDDED_BYTES} bytes in the graph's file"
            )
        if 13 in tensor or _number(tensor, 14):
            size = self._external_size(tensor, name)
        elements = 1
        for dimension in _numbers(tensor, 1):
            elements *= dimension
            if max(elements, dimension) > 2 * size:  # the smallest elements have 4 bits
                raise GraphError(f"{_shown(name)} has more elements than stored values")
        scope.constants[name] = self._add(name, elements, _width(_number(tensor, 2)))

    def _external_size(self, tensor: Message, name: str) -> int:
        entries = [_message(entry, ENTRY, "an external data entry") for entry in tensor.get(13, ())]
        locations = [_text(entry, 2) for entry in entries if _text(entry, 1) == "location"]
        if len(locations) != 1 or locations[0] not in self._sizes:
            raise GraphError(f"{_shown(name)} has its data in {locations}, which the bundle does not list")
        return self._sizes[locations[0]]


def _folded(operator: str, node: Message, constants: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Return elements and bytes of an element of what a node gives whose inputs are constants."""
    if not constants:  # a Constant: each byte of its attributes holds two elements at most
        return 2 * sum(len(_bytes(attribute)) for attribute in node.get(5, ())), 1
    elements, width = constants[0]
    if operator == "Cast":
        attributes = [_message(attribute, ATTRIBUTE, "an attribute") for attribute in node.get(5, ())]
        width = _width(next((_number(a, 3) for a in attributes[::-1] if _text(a, 1) == "to"), 0))
    elif operator == "BitwiseXor" and constants[-1][0] != 1:  # else the two may widen each other
        raise GraphError("BitwiseXor has a second constant of more than one element")
    elif operator == "DequantizeLinear":  # to the type of its scales
        width = constants[min(1, len(constants) - 1)][1]
    return elements, width


def _width(data_type: int) -> int:
    return WIDTHS.get(data_type, MAX_WIDTH)


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
    if at < len(data) and data[at] < 0x80:  # nearly all have one byte
        return data[at], at + 1
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
