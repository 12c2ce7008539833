"""PEFT directories, each damaged in one way: tables of names and of what does the damage to a directory.

Every reader refuses them all: `tests/contract`, the server and the C++ library.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from chameleon_deploy.contract.adapter_file import MAX_RANK
from chameleon_deploy.contract.peft_lora import CONFIG_FILE, TENSOR_FILE

ENDLESS = "(.|[a-z0-9._])+(?<=X)"  # takes two to the power of the length of the name

Damage = Callable[[Path], Any]
Tensors = dict[str, torch.Tensor]


def config(**changes: Any) -> Damage:
    def damage(path: Path) -> None:
        (path / CONFIG_FILE).write_text(json.dumps(json.loads((path / CONFIG_FILE).read_text()) | changes))

    return damage


def tensors(change: Callable[[Tensors, str, str], Any]) -> Damage:
    """Change tensors; `change` takes all, and the names of A and B of the last layer."""

    def damage(path: Path) -> None:
        found = load_file(path / TENSOR_FILE)
        change(found, *sorted(found)[-2:])
        save_file(found, path / TENSOR_FILE)

    return damage


def file(name: str, change: Callable[[Path, bytes], Any]) -> Damage:
    """Put something else in the place of a file; `change` takes its path and its old content."""

    def damage(path: Path) -> None:
        content = (path / name).read_bytes()
        (path / name).unlink()
        change(path / name, content)

    return damage


def _header(entries: dict[str, Any], data: bytes = b"\0" * 4) -> Damage:
    header = json.dumps(entries).encode()
    return file(TENSOR_FILE, lambda place, _: place.write_bytes(len(header).to_bytes(8, "little") + header + data))


def _longer(place: Path, content: bytes) -> None:
    place.write_bytes(content)
    os.truncate(place, 2**33)


_NAME = "base_model.model.layer.lora_A.weight"

# CheckpointError
CONFIGURATIONS: dict[str, Damage] = {
    "another-method": config(peft_type="IA3"),
    "dora": config(use_dora=True),
    "a-bias": config(lora_bias=True),
    "biases": config(bias="lora_only"),
    "whole-modules": config(modules_to_save=["ln_f"]),
    "trained-tokens": config(trainable_token_indices=[1, 2]),
    "parameters": config(target_parameters=["mlp.experts.gate_up_proj"]),
    "several-reasons": config(layer_replication=[[0, 2]], lora_bias=True, use_dora=True, zero=0, none=None, empty={}),
    "an-initialisation": config(init_lora_weights="pissa"),
    "an-unknown-option": config(some_future_option={"a": 1}),
    "layers-that-are-replicated": config(layer_replication=[[0, 2]]),
    "no-invocation-token": config(alora_invocation_tokens=[-3]),
    "many-invocation-tokens": config(alora_invocation_tokens=[3] * 257),
    "an-invocation-text": config(alora_invocation_tokens="a text"),
    "an-invocation-of-no-integer": config(alora_invocation_tokens=[3, 4.5]),
    "a-large-rank": config(r=10**9),
    "no-rank": config(r=0),
    "a-rank-in-words": config(r="four"),
    "a-rank-of-true": config(r=True),
    "a-large-rank-of-a-layer": config(rank_pattern={"c_attn": MAX_RANK + 1}),
    "ranks-in-a-list": config(rank_pattern=[3]),
    "an-alpha-in-words": config(alpha_pattern={"c_attn": "eight"}),
    "rslora-in-words": config(use_rslora="yes"),
    "modules-by-number": config(target_modules=[7]),
    "no-modules": config(target_modules=None),
    "an-initialisation-by-number": config(init_lora_weights=3),
    "layers-in-words": config(layers_to_transform="first"),
    "tokens-in-words": config(trainable_token_indices={"embed": ["a"]}),
    "an-endless-alpha": config(lora_alpha=1e999),
    "an-alpha-beyond-float64": config(lora_alpha=10**400),
    "a-broken-pattern": config(target_modules="(("),
    "a-broken-pattern-of-ranks": config(rank_pattern={"((": 2}),
    "a-group-in-layers-pattern": config(layers_to_transform=[0], layers_pattern="(h|layers)"),
    "an-endless-pattern": config(target_modules=ENDLESS),
    "an-endless-pattern-of-ranks": config(rank_pattern={ENDLESS: 2}),
    "an-endless-pattern-of-alphas": config(alpha_pattern={ENDLESS: 2}),
    "an-endless-pattern-of-layers": config(layers_to_transform=[0], layers_pattern=ENDLESS),
    "no-json": file(CONFIG_FILE, lambda place, _: place.write_bytes(b"{")),
    "no-object": file(CONFIG_FILE, lambda place, _: place.write_bytes(b"[]")),
    "no-option": file(CONFIG_FILE, lambda place, _: place.write_bytes(b"{}")),
    "no-text": file(CONFIG_FILE, lambda place, _: place.write_bytes(b'{"r": "\xff"}')),
    "nested-json": file(CONFIG_FILE, lambda place, _: place.write_bytes(b'{"r":' * 100_000)),
    "a-pipe": file(CONFIG_FILE, lambda place, _: os.mkfifo(place)),
    "a-device": file(CONFIG_FILE, lambda place, _: place.symlink_to("/dev/zero")),
    "a-directory": file(CONFIG_FILE, lambda place, _: place.mkdir()),
    "no-configuration": file(CONFIG_FILE, lambda place, _: None),
    "a-large-configuration": file(CONFIG_FILE, lambda place, content: place.write_bytes(content + b" " * 2**20)),
}

# CheckpointError
FILES: dict[str, Damage] = {
    "no-tensors": file(TENSOR_FILE, lambda place, _: None),
    "cut": file(TENSOR_FILE, lambda place, content: place.write_bytes(content[:100])),
    "empty": file(TENSOR_FILE, lambda place, _: place.write_bytes(b"")),
    "a-header-that-lies": _header({_NAME: {"dtype": "F32", "shape": [10**9, 10**9], "data_offsets": [0, 4]}}),
    "a-shape-that-overflows": _header({_NAME: {"dtype": "F32", "shape": [2**62, 2**62], "data_offsets": [0, 4]}}),
    "a-negative-shape": _header({_NAME: {"dtype": "F32", "shape": [-1, -1], "data_offsets": [0, 4]}}),
    "tensors-that-overlap": _header(
        {_NAME: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
         _NAME.replace("_A", "_B"): {"dtype": "F32", "shape": [1], "data_offsets": [2, 6]}}, b"\0" * 6,
    ),
    "tensors-with-a-gap": _header({_NAME: {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, b"\0" * 8),
    "endless-tensors": file(TENSOR_FILE, lambda place, _: place.symlink_to("/dev/zero")),
    "a-large-file": file(TENSOR_FILE, _longer),
}  # fmt: skip

# TensorError
TENSORS: dict[str, Damage] = {
    "nan": tensors(lambda found, A, B: found[A].fill_(torch.nan)),
    "infinity": tensors(lambda found, A, B: found[B].fill_(torch.inf)),
    "a-missing-layer": tensors(lambda found, A, B: (found.pop(A), found.pop(B))),
    "a-missing-part": tensors(lambda found, A, B: found.pop(B)),
    "another-rank": tensors(lambda found, A, B: found.update({A: torch.zeros(3, found[A].shape[1])})),
    "another-width": tensors(lambda found, A, B: found.update({A: torch.zeros(4, found[A].shape[1] + 1)})),
    "another-height": tensors(lambda found, A, B: found.update({B: torch.zeros(3, 4)})),
    "one-axis": tensors(lambda found, A, B: found.update({A: torch.zeros(256)})),
    "integers": tensors(lambda found, A, B: found.update({A: found[A].to(torch.int32)})),
    "float8": tensors(lambda found, A, B: found.update({A: found[A].to(torch.float8_e4m3fn)})),
    "float64-beyond-float32": tensors(lambda found, A, B: found.update({A: found[A].double() * 1e300})),
    "an-unknown-layer": tensors(
        lambda found, A, B: found.update({name.replace(".1.", ".9."): found[name].clone() for name in (A, B)})
    ),
    "a-part-of-an-unknown-layer": tensors(
        lambda found, A, B: found.update({A.replace(".1.", ".9."): found[A].clone()})
    ),
    "another-prefix": tensors(lambda found, A, B: found.update({f"model.{A}": found.pop(A)})),
    "a-name-in-two-lines": tensors(lambda found, A, B: found.update({A.replace(".1.", ".\n'é\"."): found.pop(A)})),
    "a-magnitude": tensors(
        lambda found, A, B: found.update({A.replace("lora_A.weight", "lora_magnitude_vector"): torch.ones(4)})
    ),
    "an-embedding": tensors(
        lambda found, A, B: found.update({"base_model.model.wte.lora_embedding_A": torch.ones(4, 5)})
    ),
    "a-whole-module": tensors(lambda found, A, B: found.update({"base_model.model.ln_f.weight": torch.ones(64)})),
    "another-head": tensors(
        lambda found, A, B: found.update({"base_model.model.lm_head.base_layer.weight": torch.zeros(512, 64)})
    ),
    "a-head-of-another-shape": tensors(
        lambda found, A, B: found.update({"base_model.model.lm_head.base_layer.weight": torch.zeros(3)})
    ),
    "no-layer": tensors(lambda found, A, B: found.clear()),
    "a-scaling-beyond-float32": config(lora_alpha=1e308),
    "modules-without-tensors": config(target_modules=["c_attn", "q_proj", "qkv_proj"]),
    "another-rank-of-a-layer": config(rank_pattern={r"1\..*": 2}),
}

DAMAGES = CONFIGURATIONS | FILES | TENSORS
