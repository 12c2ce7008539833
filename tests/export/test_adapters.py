"""Bundles with adapters: in a mixed batch every row is peft's own model with its adapter, on every graph of the CPU."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor

from chameleon_deploy.contract.bundle import FloatArray, open_bundle
from chameleon_deploy.export.exporter import export_bundle
from chameleon_deploy.export.int8.basis import basis_of
from chameleon_deploy.export.int8.calibration import calibrate, calibration_texts
from chameleon_deploy.export.int8.layers import layers_of
from chameleon_deploy.export.int8.rotation import balance_trunk, rotate_trunk, scale_trunk
from chameleon_deploy.reference.adapters import AdaptedBase, load_adapted
from chameleon_deploy.reference.description import adaptation_spec
from chameleon_deploy.reference.model import Trunk
from chameleon_deploy.runtime import Runtime
from chameleon_deploy.runtime.basis import enter_basis
from chameleon_deploy.runtime.decode import bound_call
from chameleon_deploy.runtime.factors import FactorSets
from chameleon_deploy.terminal.progress import silent
from tests.adapters import GPT2_LAYERS, LLAMA_LAYERS, peft_logits, save_adapter
from tests.devices import on_cpu

ROWS = [[(7 * i + 3 * j) % 512 for j in range(3 + 5 * i)] for i in range(6)]
OPTIONS: dict[str, dict[str, dict[str, Any]]] = {
    "gpt2": {
        "all": {"r": 4, "lora_alpha": 8, "target_modules": GPT2_LAYERS},
        "attention": {"r": 8, "lora_alpha": 4, "use_rslora": True, "target_modules": ["c_attn"]},
        "last": {"r": 1, "lora_alpha": 2, "target_modules": r".*\.1\.mlp\.c_(fc|proj)"},
    },
    "llama": {
        "all": {"r": 4, "lora_alpha": 8, "target_modules": LLAMA_LAYERS},
        "attention": {"r": 8, "lora_alpha": 4, "use_rslora": True, "target_modules": ["q_proj", "v_proj", "lm_head"]},
        "last": {"r": 1, "lora_alpha": 2, "target_modules": r".*\.1\.mlp\.(up|down)_proj"},
    },
}
NAMES = ["all", None, "attention", "last", "attention", "all"]  # of ROWS
Bundles = dict[str, tuple[Path, AdaptedBase, dict[str | None, Path | None]]]


@pytest.fixture(scope="module")
def bundles(mini_path: Path, llama_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundles:
    """Of each family a bundle, its reference, and the PEFT directories of its adapters."""
    made: Bundles = {}
    for family, checkpoint in (("gpt2", mini_path), ("llama", llama_path)):
        path = tmp_path_factory.mktemp(family)
        directories = {
            name: save_adapter(checkpoint / "base", path / name, seed, **options)
            for seed, (name, options) in enumerate(OPTIONS[family].items())
        }
        adapted = load_adapted(str(checkpoint / "base"), directories)
        export_bundle(adapted, path / "bundle")
        made[family] = path / "bundle", adapted, {None: None} | directories
    return made


def logits_of(runtime: Runtime, rows: Sequence[Sequence[int]], names: Sequence[str | None]) -> list[Any]:
    """Return the logits [tokens, vocab] of each row of one mixed batch."""
    factors = runtime.adapt(rows, adapters=names, on_device=True).factors
    pieces: list[list[Any]] = [[] for _ in rows]
    for start, logits in runtime.decoder.all_logits(rows, factors):
        values = np.asarray(logits)
        for i, ids in enumerate(rows):
            pieces[i].append(values[i, : max(0, len(ids) - start)].copy())
    return [np.concatenate(parts) for parts in pieces]


@pytest.mark.parametrize("graph", ["decoder", "decoder_cpu"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_every_row_of_a_mixed_batch_is_pefts_model(family: str, graph: str, bundles: Bundles) -> None:
    path, adapted, directories = bundles[family]
    runtime = on_cpu(open_bundle(path), graph)
    for ids, name, actual in zip(ROWS, NAMES, logits_of(runtime, ROWS, NAMES), strict=True):
        (expected,) = peft_logits(Path(adapted.name), directories[name], [ids])
        np.testing.assert_allclose(actual, expected, atol=5e-5)
    apart = [peft_logits(Path(adapted.name), directory, ROWS[-1:])[0] for directory in directories.values()]
    differences = [np.abs(a - b).max() for i, a in enumerate(apart) for b in apart[:i]]
    assert min(differences) > 0.05  # no adapter can be taken for another


@pytest.mark.parametrize("graph", ["decoder", "decoder_cpu"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_cached_steps_and_scores_have_each_rows_adapter(family: str, graph: str, bundles: Bundles) -> None:
    path, adapted, directories = bundles[family]
    runtime = on_cpu(open_bundle(path), graph)
    generations = runtime.generate(ROWS, adapters=NAMES, max_new_tokens=4)
    scores = runtime.score(ROWS, adapters=NAMES)
    for ids, name, generation, score in zip(ROWS, NAMES, generations, scores, strict=True):
        (logits,) = peft_logits(Path(adapted.name), directories[name], [[*ids, *generation.token_ids]])
        logprobs = torch.from_numpy(logits).log_softmax(-1)
        assert logits[len(ids) - 1 : -1].argmax(-1).tolist() == generation.token_ids
        expected = logprobs[: len(ids) - 1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
        np.testing.assert_allclose(score.token_logprobs, expected, atol=5e-5)


def test_sixteen_adapters_share_a_batch(llama_path: Path, tmp_path: Path) -> None:
    base = llama_path / "base"
    directories = {
        f"a{i}": save_adapter(base, tmp_path / f"a{i}", i, r=(1, 4, 8, 64)[i % 4], target_modules=["q_proj", "v_proj"])
        for i in range(16)
    }
    export_bundle(load_adapted(str(base), directories), tmp_path / "bundle")
    runtime, names = on_cpu(open_bundle(tmp_path / "bundle"), "decoder_cpu"), [*directories, None]
    rows = [ROWS[2]] * len(names)
    for name, actual in zip(names, logits_of(runtime, rows, names), strict=True):
        (expected,) = peft_logits(base, directories.get(str(name)), rows[:1])
        np.testing.assert_allclose(actual, expected, atol=5e-4)


def test_layers_that_no_adapter_has_cost_no_operator(llama_path: Path, tmp_path: Path) -> None:
    base, counts = llama_path / "base", {}
    for layers in (["q_proj"], ["q_proj", "o_proj"]):
        out = tmp_path / "+".join(layers)
        directory = save_adapter(base, out / "peft", r=2, target_modules=layers)
        export_bundle(load_adapted(str(base), {"own": directory}), out / "bundle")
        graph = onnx.load(out / "bundle" / "decoder.onnx", load_external_data=False).graph
        counts[len(layers)] = sum(node.op_type == "MatMul" for node in graph.node)
        assert {value.name for value in graph.input if ".lora_A" in value.name} == {
            f"model.layers.{i}.self_attn.{layer}.lora_A" for i in range(2) for layer in layers
        }
    assert counts[2] - counts[1] == 2 * 2  # A and B of o_proj in each of two layers


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_cpus_decoder_multiplies_the_trunks_factors_as_they_come(family: str, bundles: Bundles) -> None:
    path, adapted, _ = bundles[family]
    graph = onnx.load(path / "decoder_cpu.onnx", load_external_data=False).graph
    factors = {value.name: value.type.tensor_type.shape.dim for value in graph.input if ".lora_" in value.name}
    assert {name: len(dims) for name, dims in factors.items()} == {
        name: 3 if name.startswith("lm_head.") else 2 for name in adaptation_spec(adapted).factor_widths
    }
    readers = {node.op_type for node in nodes_of(graph) for name in node.input if len(factors.get(name, ())) == 2}
    assert readers == {"MatMul", "Transpose", "Reshape"}  # of one set, and of several
    assert "column_ids" in {value.name for value in graph.input}


def nodes_of(graph: Any) -> Iterator[Any]:
    """Yield the nodes of a graph and of those in it."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            yield from nodes_of(attribute.g)


def test_updates_that_are_left_out_are_caught(bundles: Bundles, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fault: columns that are told to be of no set."""
    path, adapted, directories = bundles["llama"]

    def of_no_set(sets: FactorSets) -> dict[str, Any]:
        inputs = inputs_of(sets)
        return inputs | {"column_ids": np.full_like(inputs["column_ids"], -1)}

    inputs_of = bound_call._inputs_of
    monkeypatch.setattr(bound_call, "_inputs_of", of_no_set)
    actual = logits_of(on_cpu(open_bundle(path), "decoder_cpu"), ROWS, NAMES)
    pairs = zip(ROWS, NAMES, strict=True)
    expected = [peft_logits(Path(adapted.name), directories[name], [ids])[0] for ids, name in pairs]
    assert max(np.abs(a - b).max() for a, b in zip(actual, expected, strict=True)) > 0.05


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_factors_in_the_int8_basis_follow_their_layers_matrices(family: str, bundles: Bundles) -> None:
    """A layer whose matrix is A^T B is rotated and scaled to A'^T B'."""
    _, adapted, _ = bundles[family]
    trunk, spec = adapted.trunk, adaptation_spec(adapted)
    rotated = rotate_trunk(trunk)
    statistics = calibrate(rotated, calibration_texts(trunk, None)[:2], silent)
    balances = balance_trunk(rotated, statistics)
    basis = basis_of(trunk, statistics.layers, statistics.first_tokens, balances)
    tensors, _ = basis.of([target.name for target in spec.targets])
    rank = min(trunk.spec.hidden_size, 64)
    generator = np.random.default_rng(0)
    plain: dict[str, FloatArray] = {
        name: np.asarray(generator.normal(0, 1 / 8, (rank, width)), np.float32)
        for name, width in spec.factor_widths.items()
    }
    low_rank = load_adapted(adapted.name, {}).trunk
    for target in spec.targets:
        if target.name != "lm_head":
            product = torch.from_numpy(plain[f"{target.name}.lora_A"].T @ plain[f"{target.name}.lora_B"])
            weight = low_rank.causal_lm.get_submodule(target.name).weight
            weight.data.copy_(product if family == "gpt2" else product.T)
    scaled = rotate_trunk(low_rank)
    with torch.no_grad():
        for layer, balance in zip(layers_of(scaled), balances, strict=True):
            if balance is not None:
                layer.ups[1].matrix.mul_(balance)
                layer.down.matrix.div_(balance[:, None])
    scale_trunk(scaled, statistics)
    entered = enter_basis(plain, spec, tensors)
    for layer in layers_of(scaled):
        names = layer.targets
        qkv = [layer.q.matrix, layer.k.matrix, layer.v.matrix]
        matrices = [torch.cat(qkv, 1)] if len(names.qkv) == 1 else qkv
        matrices += [layer.o.matrix, *(up.matrix for up in layer.ups), layer.down.matrix]
        for name, matrix in zip((*names.qkv, *names.o, *names.up, *names.down), matrices, strict=True):
            actual = entered[f"{name}.lora_A"].T @ entered[f"{name}.lora_B"]
            np.testing.assert_allclose(actual, matrix.numpy(), rtol=1e-3, atol=1e-3 * float(matrix.abs().max()))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_updates_read_what_their_layers_read_before_centres_were_taken(family: str, bundles: Bundles) -> None:
    _, adapted, _ = bundles[family]
    trunk, spec = adapted.trunk, adaptation_spec(adapted)
    scaled = rotate_trunk(trunk)
    statistics = calibrate(scaled, calibration_texts(trunk, None)[:2], silent)
    balances = balance_trunk(scaled, statistics)
    scale_trunk(scaled, statistics)
    targets = [target.name for target in spec.targets if target.name != "lm_head"]
    basis = basis_of(trunk, statistics.layers, statistics.first_tokens, balances)
    tensors, shifts = basis.of([target.name for target in spec.targets])
    assert {name for name in targets if np.abs(shifts.get(name, 0)).max() > 0.1} >= {
        name for name in targets if name.endswith(("o_proj", "attn.c_proj", "up_proj", "gate_proj", "c_fc"))
    }
    generator = np.random.default_rng(0)
    plain = {
        name: np.asarray(generator.normal(0, 1, (4, width)), np.float32) for name, width in spec.factor_widths.items()
    }
    entered = enter_basis(plain, spec, tensors)

    def inputs_of(of: Trunk) -> dict[str, Tensor]:
        seen: dict[str, Tensor] = {}
        for name in targets:
            keep = lambda module, inputs, name=name: seen.update({name: inputs[0]})  # noqa: E731
            of.causal_lm.get_submodule(name).register_forward_pre_hook(keep)
        with torch.no_grad():
            of.hidden_states(torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]]))
        return seen

    before, now = inputs_of(load_adapted(adapted.name, {}).trunk), inputs_of(scaled)
    for name in targets:
        expected = before[name].numpy() @ plain[f"{name}.lora_A"].T
        x = now[name].numpy() + shifts.get(name, np.float32(0))
        actual = x @ entered[f"{name}.lora_A"].T
        np.testing.assert_allclose(actual, expected, rtol=1e-3, atol=1e-3 * float(np.abs(expected).max()))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_int8_rows_are_near_pefts_model(family: str, bundles: Bundles, tmp_path: Path) -> None:
    _, adapted, directories = bundles[family]
    export_bundle(adapted, tmp_path / "bundle", precision="int8")
    for graph in ("decoder", "decoder_cpu"):
        runtime = on_cpu(open_bundle(tmp_path / "bundle"), graph)
        for ids, name, actual in zip(ROWS, NAMES, logits_of(runtime, ROWS, NAMES), strict=True):
            (expected,) = peft_logits(Path(adapted.name), directories[name], [ids])
            (plain,) = peft_logits(Path(adapted.name), None, [ids])
            error = np.square(actual - expected).mean() / np.square(expected).mean()
            assert error < 0.01
            if name is not None:  # nearer to its own model than to the base, by far
                assert np.square(actual - expected).mean() < 0.1 * np.square(plain - expected).mean()
