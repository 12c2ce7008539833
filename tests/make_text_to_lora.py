"""Writes tests/data/text_to_lora with the program of the text-to-LoRA authors: their files and what they generate.

    git clone https://github.com/SakanaAI/text-to-lora COPY && git -C COPY checkout 4e7ce39
    python -m tests.make_text_to_lora COPY                    # the golden files
    python -m tests.make_text_to_lora COPY --base smollm2     # compares on the shape of a base model

Each case is a directory with `hypermod.pt`, `args.yaml`, `adapter_config.json` and `golden.safetensors`: the LoRA that
the authors' `gen_lora` makes of each vector. Nothing of their code is copied: it is imported from the copy.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file

from chameleon_deploy.reference.model import load_trunk
from chameleon_deploy.reference.text_to_lora import TextToLoraFiles, load_text_to_lora
from tests.families import small_model
from tests.shared_data import DATA
from tests.text_to_lora import CASES, ORDERS, SIZE, VECTORS, example_ids

UNUSED = ("inflect", "pandas", "torchmetrics", "torchmetrics.text", "torchmetrics.text.rouge", "wandb")  # by a network
STEPS = 60


def import_published(copy: Path) -> Any:
    for name in UNUSED:
        sys.modules.setdefault(name, types.ModuleType(name))
    sys.modules["torchmetrics.text.rouge"].ROUGEScore = object  # type: ignore[attr-defined]
    sys.path.insert(0, str(copy / "src"))
    from hyper_llm_modulator import hooks, hyper_modulator  # type: ignore[import-not-found]

    return hyper_modulator, hooks


def published(modulator: Any, base: Any, case: dict[str, Any], order: tuple[str, ...], size: int) -> tuple[Any, ...]:
    """Return the authors' network for a base model, its PEFT configuration and its options, of random weights."""
    config = LoraConfig(
        r=2, lora_alpha=4, lora_dropout=0.05, use_rslora=True, target_modules=list(order), task_type="CAUSAL_LM",
        base_model_name_or_path="base",
    )  # fmt: skip
    model = get_peft_model(base, config)
    config.target_modules = list(order)  # in the place of a set, so that a run is repeatable
    options = {
        "training_task": "sft", "exp_setup": "hyper_lora", "encoder_type": "linear", "shared_AB_head": False,
        "autoreg_gen": False, "learnable_pos_emb": False, "learnable_AB_offset": False, "mt_lora_path": None,
        "pred_z_score": False, "factorized": False, "delta_w_scaling": 10000, "use_one_hot_task_emb": False,
        "hypernet_latent_size": 16, "head_in_size": 16, "emb_model": "Alibaba-NLP/gte-large-en-v1.5",
        "target_modules": sorted(order), "model_dir": "base", "train_ds_names": ["lol_1"],
    } | case  # fmt: skip
    layers = torch.arange(base.config.num_hidden_layers)
    network = modulator.create_hypermod(
        argparse.Namespace(**options), "lora", "cpu", model, layers, size, from_scratch=False
    )
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            # what starts at zero would hide mistakes
            if name.startswith("AB_offset") and options["mt_lora_path"] is None:
                continue
            parameter.add_(torch.randn_like(parameter) * (0.1 if parameter.dim() > 1 else 0.3))
    return network.eval(), config, options, model, layers


def train(network: Any, hooks: Any, model: Any, layers: Any) -> None:
    """A few steps on two texts, each under its own vector."""
    optimizer = torch.optim.AdamW([p for n, p in network.named_parameters() if "offset" not in n], lr=3e-3)
    for parameter in network.parameters():
        parameter.requires_grad_(not parameter.is_leaf or parameter.requires_grad)
    for step in range(STEPS):
        vector, ids = torch.from_numpy(VECTORS[[step % 2]]), torch.tensor([example_ids(step % 2)])
        encoded = network.task_encoder(vector)["encoded_task_emb"].expand(len(layers), -1)
        handles = []
        for name in network.target_modules:
            lora_A, lora_B = network.get_delta_weights(layers, name, encoded, factorized=True)
            for layer in layers.tolist():
                handles += hooks.add_lora_hooks(
                    model.base_model, [name], [layer], lora_A[[layer]].mT, lora_B[[layer]].mT, network.scaling, 0.0,
                    False,
                )  # fmt: skip
        with model.disable_adapter():
            loss = model(ids, labels=ids).loss
        for handle in handles:
            if handle is not None:
                handle.remove()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"loss after {STEPS} steps: {loss.item():.3f}")


@torch.no_grad()
def write(out: Path, network: Any, config: Any, options: dict[str, Any], layers: Any, vectors: Any) -> dict[str, Any]:
    """Write the three files, and return what the authors' program generates."""
    out.mkdir(parents=True)
    torch.save(network.state_dict(), out / "hypermod.pt")
    (out / "args.yaml").write_text(yaml.dump(options))
    config.save_pretrained(out)
    golden: dict[str, Any] = {}
    for i, vector in enumerate(torch.from_numpy(vectors)):
        encoded = network.task_encoder(vector[None])["encoded_task_emb"]
        for name, tensor in network.gen_lora(layers, encoded).items():
            golden[f"{i}.{name}"] = tensor.contiguous()
    return golden


def compare(modulator: Any, hooks: Any, base_path: str) -> None:
    """Print the largest difference from the published module on a real base's shape."""
    vectors = np.random.default_rng(0).normal(size=(2, 768)).astype(np.float32)
    for name, case in CASES.items():
        base = load_trunk(base_path).causal_lm
        torch.manual_seed(0)
        network, config, options, _, layers = published(
            modulator, base, case | {"hypernet_latent_size": 128, "head_in_size": 256}, ORDERS[name], 768
        )
        if name == "trained":  # short of a real training, weights that an optimizer has moved
            optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
            for _ in range(5):
                encoded = network.task_encoder(torch.from_numpy(vectors[:1]))["encoded_task_emb"]
                expanded = encoded.expand(len(layers), -1)
                loss = sum(network.get_delta_weights(layers, t, expanded).square().mean() for t in ORDERS[name])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        with tempfile.TemporaryDirectory() as directory:
            out = Path(directory) / "network"
            golden = write(out, network, config, options, layers, vectors)
            del base
            ours = load_text_to_lora(base_path, TextToLoraFiles(out, ORDERS[name])).factors(torch.from_numpy(vectors))
        largest, difference = 0.0, 0.0
        for key, tensor in golden.items():
            row, _, target = key.partition(".")
            found = ours[target.removeprefix("base_model.model.").removesuffix(".weight")][int(row)]
            largest = max(largest, float(tensor.abs().max()))
            difference = max(difference, float((tensor - found).abs().max()))
        print(f"{name}: {len(golden)} tensors, largest {largest:.3g}, largest difference {difference:.2g}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("copy", type=Path)
    parser.add_argument("--base")
    arguments = parser.parse_args()
    modulator, hooks = import_published(arguments.copy)
    if arguments.base:
        compare(modulator, hooks, arguments.base)
        return
    directory = DATA / "text_to_lora"
    shutil.rmtree(directory, ignore_errors=True)
    for name, case in CASES.items():
        base = small_model("llama")
        torch.manual_seed(0)
        network, config, options, model, layers = published(modulator, base, case, ORDERS[name], SIZE)
        if name == "trained":
            train(network, hooks, model, layers)
        golden = write(directory / name, network, config, options, layers, VECTORS)
        save_file(golden, directory / name / "golden.safetensors")
        (directory / name / "README.md").unlink(missing_ok=True)  # of PEFT


if __name__ == "__main__":
    main()
