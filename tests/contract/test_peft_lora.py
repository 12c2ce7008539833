"""PEFT directories: what peft itself writes is read as peft computes it, everything else is refused by name."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from chameleon_deploy.contract.peft_lora import read_peft
from chameleon_deploy.errors import CheckpointError, TensorError
from chameleon_deploy.reference.adapters import AdapterLogits, load_adapted
from chameleon_deploy.reference.model import Trunk, load_trunk
from tests.adapters import GPT2_LAYERS, LLAMA_LAYERS, peft_logits, save_adapter
from tests.damaged_adapters import CONFIGURATIONS, DAMAGES, FILES, TENSORS

ROW = [5, 9, 301, 17, 44, 8, 121]


@pytest.fixture(scope="module")
def gpt2_base(mini_path: Path) -> Path:
    return mini_path / "base"


@pytest.fixture(scope="module")
def trunk(gpt2_base: Path) -> Trunk:
    return load_trunk(gpt2_base)


@pytest.fixture
def saved(gpt2_base: Path, tmp_path: Path) -> Path:
    """An adapter of rank 4 of all layers, to be damaged."""
    return save_adapter(gpt2_base, tmp_path / "adapter", r=4, lora_alpha=8, target_modules=GPT2_LAYERS)


OPTIONS: dict[str, dict[str, Any]] = {
    "rank 1": {"r": 1, "lora_alpha": 3, "target_modules": LLAMA_LAYERS},
    "rank 8, rsLoRA": {"r": 8, "lora_alpha": 4, "use_rslora": True, "target_modules": ["q_proj", "v_proj"]},
    "patterns": {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": LLAMA_LAYERS,
        "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.up_proj": 6},
        "alpha_pattern": {"v_proj": 32, "1.self_attn.o_proj": 1},
    },
    "regex": {"r": 2, "lora_alpha": 2, "target_modules": r".*\.1\.(self_attn|mlp)\.(k|down)_proj"},
    "all linear layers": {"r": 2, "lora_alpha": 2, "target_modules": "all-linear"},
    "one layer": {"r": 2, "lora_alpha": 2, "target_modules": ["q_proj"], "layers_to_transform": [1]},
    "without some": {"r": 2, "lora_alpha": 2, "target_modules": LLAMA_LAYERS, "exclude_modules": ["gate_proj"]},
    "head": {"r": 2, "lora_alpha": 2, "target_modules": ["lm_head", "o_proj"]},
    "EVA": {"r": 2, "lora_alpha": 2, "target_modules": ["q_proj"], "init_lora_weights": "eva"},
    "orthogonal": {"r": 2, "lora_alpha": 2, "target_modules": ["q_proj"], "init_lora_weights": "orthogonal"},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_an_adapter_of_a_llama_computes_what_peft_computes(
    options: dict[str, Any], llama_path: Path, tmp_path: Path
) -> None:
    base = llama_path / "base"
    directory = save_adapter(base, tmp_path / "adapter", **options)
    reference = AdapterLogits(load_adapted(str(base), {"own": directory}))
    (expected,), (plain,) = peft_logits(base, directory, [ROW]), peft_logits(base, None, [ROW])
    np.testing.assert_allclose(reference(ROW, ["own"], 0).numpy(), expected, atol=2e-5)
    np.testing.assert_allclose(reference(ROW, [None], 0).numpy(), plain, atol=2e-5)
    assert np.abs(expected - plain).max() > 0.05


def test_an_adapter_of_a_gpt2_computes_what_peft_computes(saved: Path, gpt2_base: Path) -> None:
    reference = AdapterLogits(load_adapted(str(gpt2_base), {"own": saved}))
    np.testing.assert_allclose(reference(ROW, ["own"], 0).numpy(), peft_logits(gpt2_base, saved, [ROW])[0], atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"use_dora": True},
        {"bias": "lora_only"},
        {"modules_to_save": ["ln_f"]},
        {"lora_bias": True},
        {"init_lora_weights": "pissa"},
        {"trainable_token_indices": [1, 2]},
    ],
    ids=lambda options: next(iter(options)),
)
def test_what_is_no_plain_low_rank_update_is_refused_by_name(
    options: dict[str, Any], gpt2_base: Path, trunk: Trunk, tmp_path: Path
) -> None:
    directory = save_adapter(gpt2_base, tmp_path / "adapter", r=2, target_modules=["c_attn"], **options)
    with pytest.raises(CheckpointError, match=next(iter(options))):
        read_peft(directory, trunk.linear_layers(), trunk.head_weight)


@pytest.mark.parametrize("name", [*CONFIGURATIONS, *FILES])
def test_a_configuration_or_a_file_that_makes_no_sense_is_refused(name: str, saved: Path, trunk: Trunk) -> None:
    DAMAGES[name](saved)
    with pytest.raises(CheckpointError, match="adapter_config" if name in CONFIGURATIONS else "adapter_model"):
        read_peft(saved, trunk.linear_layers(), trunk.head_weight)


@pytest.mark.parametrize("name", TENSORS)
def test_tensors_that_do_not_fit_the_configuration_are_refused(name: str, saved: Path, trunk: Trunk) -> None:
    DAMAGES[name](saved)
    with pytest.raises(TensorError, match="scaled by" if "scaling" in name else str(saved)):
        read_peft(saved, trunk.linear_layers(), trunk.head_weight)


# Arguments: a directory, the output width of its layers, and whether arrays are made in between.
READ_BY_THREADS = """
import sys, threading
from pathlib import Path
import numpy as np
from chameleon_deploy.contract import peft_lora

path, layers = Path(sys.argv[1]), {f"l{i}": (8, int(sys.argv[2])) for i in range(4)}

class Copying:
    def __getattr__(self, name):
        return getattr(np, name)
    def multiply(self, matrix, scaling, out, dtype):
        out[:] = matrix.astype(dtype) * scaling
def resident():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) * 1024

if sys.argv[3] == "copies":
    peft_lora.np = Copying()
peft_lora.read_peft(path, layers)  # what the first call of all imports
before, everyone = resident(), threading.Barrier(5)
def work():
    for _ in range(2):
        peft_lora.read_peft(path, layers)
    everyone.wait()  # a thread that ends may give its memory to another
    everyone.wait()
threads = [threading.Thread(target=work) for _ in range(4)]
for thread in threads:
    thread.start()
everyone.wait()
print(resident() - before)
everyone.wait()
"""


@pytest.mark.parametrize("how", ["as it is", "copies"])
def test_threads_that_read_adapters_keep_no_memory(tmp_path: Path, how: str) -> None:
    rank, width = 16, 150_000
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": [f"l{i}" for i in range(4)]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    both = {"lora_A": np.ones((rank, 8), np.float32), "lora_B": np.ones((width, rank), np.float32)}
    tensors = {f"base_model.model.l{i}.{name}.weight": both[name] for i in range(4) for name in both}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    command = [sys.executable, "-c", READ_BY_THREADS, str(tmp_path), str(width), how]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert (int(result.stdout) > 4 * rank * width) == (how == "copies"), f"{int(result.stdout) / 2**20:.1f} MiB"
