"""Whether other programs read the LoRAs that `adapter` writes: `python -m tests.peft_readers LLAMA_CPP`.

LLAMA_CPP is a directory with llama.cpp's convert_lora_to_gguf.py, such as vendor/llama.cpp in the source archive of
llama-cpp-python. What the converter writes is compared with the factors. With `--vllm DIR`, an unpacked wheel of vLLM,
its reader is asked too.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from safetensors.numpy import load_file

from chameleon_deploy.contract.peft_lora import CONFIG_FILE, PREFIX, TENSOR_FILE
from chameleon_deploy.export.exporter import export_bundle
from chameleon_deploy.reference.checkpoint import load_checkpoint
from chameleon_deploy.reference.random import random_checkpoint

# llama.cpp's names of a layer's matrices. Of queries and keys it stores the rows in another order.
LAYERS = {
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("llama_cpp", type=Path)
    parser.add_argument("--vllm", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory)
        random_checkpoint(out / "checkpoint", "llama-mini", targets=["attention", "mlp"])
        export_bundle(load_checkpoint(out / "checkpoint"), out / "bundle")
        written = out / "lora"
        _run(sys.executable, "-m", "chameleon_deploy.adapter", out / "bundle", "--cluster", 0, "--out", written)
        converted, base = out / "lora.gguf", out / "checkpoint" / "base"
        converter = options.llama_cpp / "convert_lora_to_gguf.py"
        _run(sys.executable, converter, written, "--base", base, "--outfile", converted)
        tensors = load_file(written / TENSOR_FILE)
        print(f"llama.cpp: {compare(converted, tensors)} tensors, equal where the order is the same")
        if options.vllm:
            print(f"vLLM: {read_by_vllm(options.vllm, written, tensors)} layers, equal")


def compare(converted: Path, tensors: dict[str, Any]) -> int:
    """Return how many tensors a GGUF file has, which are those of a PEFT directory."""
    import gguf

    reader = gguf.GGUFReader(converted)
    found = {tensor.name: np.array(tensor.data) for tensor in reader.tensors}
    assert len(found) == len(tensors), (len(found), len(tensors))
    assert float(reader.fields["adapter.lora.alpha"].contents()) == len(found["blk.0.ffn_up.weight.lora_a"])
    for layer, name in LAYERS.items():
        for number in range(2):
            for part in "AB":
                ours = tensors[f"{PREFIX}model.layers.{number}.{layer}.lora_{part}.weight"]
                np.testing.assert_array_equal(found[f"blk.{number}.{name}.weight.lora_{part.lower()}"], ours)
    for number in range(2):
        for layer, name in (("q_proj", "attn_q"), ("k_proj", "attn_k")):
            ours = tensors[f"{PREFIX}model.layers.{number}.self_attn.{layer}.lora_B.weight"]
            theirs = found[f"blk.{number}.{name}.weight.lora_b"]
            np.testing.assert_array_equal(np.sort(theirs, axis=0), np.sort(ours, axis=0))
    return len(found)


# The modules of vLLM that read an adapter. All others are left out: they need a GPU's libraries.
READER = {"lora_model", "lora_weights", "peft_helper", "utils"}


class WithoutTheRest(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports vLLM's reader from an unpacked wheel, and a stand-in for every other module of vLLM."""

    def __init__(self, wheel: Path) -> None:
        self._directory = wheel / "vllm" / "lora"

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        parent, _, module = name.rpartition(".")
        if parent == "vllm.lora" and module in READER:
            return importlib.util.spec_from_file_location(name, self._directory / f"{module}.py")
        if name.partition(".")[0] == "vllm":
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: Any) -> Any:
        module = mock.MagicMock(name=spec.name)
        module.__path__, module.PIN_MEMORY = [], False
        return module

    def exec_module(self, module: Any) -> None:
        pass


def read_by_vllm(wheel: Path, written: Path, tensors: dict[str, Any]) -> int:
    """Return how many layers vLLM's reader finds, with the factors of a PEFT directory."""
    sys.meta_path.insert(0, WithoutTheRest(wheel))
    reader, options = (importlib.import_module(f"vllm.lora.{name}") for name in ("lora_model", "peft_helper"))
    helper = options.PEFTHelper.from_dict(json.loads((written / CONFIG_FILE).read_text()))
    assert helper.vllm_lora_scaling_factor == 1
    expected = {name.rpartition(".")[2] for name in LAYERS} | {"q_proj", "k_proj"}
    model = reader.LoRAModel.from_local_checkpoint(str(written), expected, helper, lora_model_id=1, device="cpu")
    for name, weights in model.loras.items():
        for part, tensor in (("A", weights.lora_a), ("B", weights.lora_b)):
            np.testing.assert_array_equal(tensor.numpy(), tensors[f"{PREFIX}{name}.lora_{part}.weight"])
    assert 2 * len(model.loras) == len(tensors)
    return len(model.loras)


def _run(*words: Any) -> None:
    subprocess.run(list(map(str, words)), check=True)


if __name__ == "__main__":
    main()
