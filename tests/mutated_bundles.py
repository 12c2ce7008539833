"""Bundles with one random change to one file, sealed with new digests so that the change reaches the parsers."""

from __future__ import annotations

import json
import random
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnx

from tests.damage import reseal

VALUES: tuple[Any, ...] = (
    0, 1, -1, 2, 3, 255, 256, 65536, 2**31 - 1, 2**31, 2**32, 2**63 - 1, 2**63, -(2**63), 10**30, 0.5, -0.0, 1e308,
    None, True, False, "", "x", "lm_head", "fp16", "int8", "shared", "growing", "batch", "é\0", "9" * 5000,
    [], [1], {}, {"x": 1},
)  # fmt: skip
FLOATS = (0.0, -0.0, 1e-45, 3e38, -3e38, float("inf"), float("nan"))


def mutate(good: Path, out: Path, seed: int) -> str:
    """Write a copy of a good bundle with the change that a seed gives. Return what was changed, for people."""
    shutil.copytree(good, out)
    chance = random.Random(seed)
    file = chance.choice(sorted(out.iterdir()))
    kind = chance.choice(KINDS.get(file.suffix, (_change_bytes,)))
    what = kind(file, chance)
    if file.name == "bundle.json":
        return f"{file.name}: {what}"  # resealing would need valid JSON
    reseal(out)
    return f"{file.name}: {what}"


def _change_bytes(file: Path, chance: random.Random) -> str:
    """Overwrite, remove, insert or repeat a piece."""
    content = file.read_bytes()
    at = chance.randrange(len(content) + 1)
    size = chance.choice((1, 2, 4, 8, 100, 5000))
    how = chance.choice(("overwrite", "remove", "insert", "repeat", "cut"))
    piece = {
        "overwrite": chance.randbytes(min(size, len(content) - at)), "remove": b"", "insert": chance.randbytes(size),
        "repeat": content[at : at + size] * 2, "cut": b"",
    }[how]  # fmt: skip
    end = len(content) if how == "cut" else at + (0 if how == "insert" else size)
    file.write_bytes(content[:at] + piece + content[end:])
    return f"{how} {size} bytes at {at}"


def _change_json(file: Path, chance: random.Random) -> str:
    content = json.loads(file.read_bytes())
    what = _change_value(content, chance)
    file.write_text(json.dumps(content))
    return what


def _change_value(content: Any, chance: random.Random) -> str:
    """Replace, remove, copy or add one value of a JSON document."""
    parent, key = chance.choice(list(_places(content)))
    old = parent[key]
    match chance.choice(("replace", "replace", "near", "remove", "copy", "add")):
        case "near" if isinstance(old, int) and not isinstance(old, bool):
            parent[key] = chance.choice((old - 1, old + 1, 2 * old, -old, old // 2, 1000 * old))
        case "remove":
            del parent[key]
        case "copy":
            other, other_key = chance.choice(list(_places(content)))
            parent[key] = json.loads(json.dumps(other[other_key]))
        case "add" if isinstance(parent, dict):
            parent[chance.choice(("x", "size", "../x", "a" * 300, "weights.bin"))] = chance.choice(VALUES)
        case _:
            parent[key] = chance.choice(VALUES)
    new = parent[key] if isinstance(parent, dict) and key in parent else None
    return f"{key} {old!r:.40} -> {new!r:.40}"


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every element of a JSON document, as its container and its key. Of long containers only the ends."""
    keys = list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []
    for key in keys[:20] + keys[20:][-2:]:
        yield value, key
        yield from _places(value[key])


def _change_header(file: Path, chance: random.Random) -> str:
    """Change the JSON header of a safetensors file."""
    content = file.read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + size])
    what = _change_value(header, chance)
    changed = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", chance.choice((len(changed),) * 9 + (0,))) + changed + content[8 + size :])
    return what


def _change_floats(file: Path, chance: random.Random) -> str:
    content = bytearray(file.read_bytes())
    value, count = chance.choice(FLOATS), chance.choice((1, 100))
    for _ in range(count):
        at = 4 * chance.randrange(max(1, len(content) // 4))
        content[at : at + 4] = struct.pack("<f", value)
    file.write_bytes(content)
    return f"{count} numbers become {value}"


def _change_graph(file: Path, chance: random.Random) -> str:
    """Change one node, attribute, initializer or input of a graph."""
    model = onnx.load(file, load_external_data=False)
    graph = model.graph
    node = chance.choice(graph.node)
    match chance.choice(("operator", "remove", "input", "output", "attribute", "tensor", "signature", "twice", "swap")):
        case "operator":
            node.op_type = chance.choice(graph.node).op_type
        case "remove":
            graph.node.remove(node)
        case "input" if node.input:
            node.input[chance.randrange(len(node.input))] = chance.choice([*graph.node[0].input, *node.output, ""])
        case "output":
            node.output[0] = chance.choice(graph.node).output[0]
        case "attribute" if node.attribute:
            attribute = chance.choice(node.attribute)
            attribute.i, attribute.f = chance.choice((0, -1, 1, 7, 2**31, 2**62)), chance.choice(FLOATS)
            if attribute.ints:
                attribute.ints[0] = chance.choice((0, -1, 2**31, 2**62))
        case "tensor" if graph.initializer:
            tensor = chance.choice(graph.initializer)
            match chance.choice(("dims", "type", "data", "name")):
                case "dims" if tensor.dims:
                    tensor.dims[0] = chance.choice((0, 1, 2 * tensor.dims[0], 2**31, -1))
                case "type":
                    tensor.data_type = chance.randrange(24)
                case "data" if tensor.external_data:
                    chance.choice(tensor.external_data).value = chance.choice(
                        ("0", "-1", "4", str(2**62), "weights.bin")
                    )
                case _:
                    tensor.name = chance.choice(graph.initializer).name
        case "signature":
            value = chance.choice([*graph.input, *graph.output])
            shape = value.type.tensor_type.shape.dim
            if shape:
                chance.choice(shape).dim_value = chance.choice((0, 1, 5, 2**31))
        case "twice":
            graph.node.append(node)
        case _:
            other = chance.choice(graph.node)
            node.op_type, other.op_type = other.op_type, node.op_type
    file.write_bytes(model.SerializeToString())
    return f"at {node.op_type} {node.name}"


KINDS: dict[str, tuple[Callable[[Path, random.Random], str], ...]] = {
    ".json": (_change_json, _change_json, _change_json, _change_bytes),
    ".onnx": (_change_graph, _change_graph, _change_bytes),
    ".safetensors": (_change_header, _change_header, _change_floats, _change_bytes),
    ".bin": (_change_floats, _change_bytes),
}
