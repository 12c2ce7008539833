"""The reference: the paper's counts, the formulas of docs/design.md, and the three kinds of checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors.torch import load_file, save_file

from chameleon_deploy.contract.bundle import TargetSpec
from chameleon_deploy.errors import (
    ChameleonError,
    CheckpointError,
    InputError,
    TensorError,
    UnsupportedBaseError,
    VersionError,
)
from chameleon_deploy.reference import clustering, inference
from chameleon_deploy.reference.checkpoint import Checkpoint, load_checkpoint
from chameleon_deploy.reference.hypernetwork import Hypernetwork, num_factors, num_parameters
from chameleon_deploy.reference.model import trunk_from
from chameleon_deploy.reference.random import base_config
from tests.conftest import checkpoint_around
from tests.logits import row_logits

HEAD_OF_GPT2 = [TargetSpec("lm_head", 768, 50257)]


def test_the_three_counts_of_the_paper() -> None:
    import transformers

    with torch.device("meta"):
        trunk = trunk_from(transformers.GPT2LMHeadModel(transformers.GPT2Config()), None)
        hypernetwork = Hypernetwork(768, HEAD_OF_GPT2, 4, (64, 32))
    assert trunk.num_parameters() == 124_439_808
    assert num_factors(HEAD_OF_GPT2, 4) == 204_100
    assert num_parameters(hypernetwork) == 6_786_596


def test_factor_layout_is_designs() -> None:
    torch.manual_seed(0)
    hypernetwork = Hypernetwork(6, [TargetSpec("lm_head", 6, 10)], 2, (5, 3)).eval()
    u = torch.randn(1, 6)
    flat = hypernetwork.layers[2](torch.relu(hypernetwork.layers[1](torch.relu(hypernetwork.layers[0](u)))))[0]
    lora_A, lora_B = hypernetwork(u).values()
    assert torch.equal(lora_A[0], flat[:12].reshape(2, 6))
    assert torch.equal(lora_B[0], flat[12:].reshape(10, 2))


def test_logits_follow_the_formula() -> None:
    checkpoint = checkpoint_around(base_config("mini"))
    checkpoint.config = msgspec.structs.replace(checkpoint.config, alpha=0.5)
    rows = [[5, 6, 7], [8, 9]]
    adaptation, logits = inference.adapt(checkpoint, rows, "request"), inference.RowLogits(checkpoint)
    for row, ids in enumerate(rows):
        h = logits.read(ids)[0]
        A, B = (factor[row] for factor in adaptation.factors.values())
        expected = h @ checkpoint.trunk.head_weight.T + 0.5 * (h @ A.T) @ B.T
        torch.testing.assert_close(logits(ids, adaptation, row), expected)


@pytest.mark.parametrize("size", ["mini", "llama-mini"])
def test_dropping_the_layers_keeps_the_head(size: str) -> None:
    checkpoint = checkpoint_around(base_config(size))
    trunk, logits = checkpoint.trunk, inference.RowLogits(checkpoint)
    adaptation = inference.adapt(checkpoint, [[5, 6, 7]], "request")
    before = logits([5, 6, 7], adaptation, 0)
    parameters, tied = trunk.num_parameters(), trunk.is_tied
    trunk.drop_layers()
    assert (trunk.num_parameters(), trunk.is_tied) == (parameters, tied)
    assert torch.equal(logits([5, 6, 7], adaptation, 0), before)
    torch.testing.assert_close(logits([5, 6, 7], adaptation, 0, slice(1, 3)), before[1:])
    kept = {id(trunk.token_embedding), id(trunk.head_weight)}
    assert {p.is_meta for p in trunk.causal_lm.parameters() if id(p) not in kept} == {True}
    with pytest.raises(RuntimeError):
        trunk.hidden_states(torch.tensor([[1, 2]]))


def test_text_embedding_has_length_one_and_ignores_order() -> None:
    table = torch.randn(20, 6)
    e = clustering.embed_text(torch.tensor([1, 2, 3]), table)
    assert abs(float(e.norm()) - 1) < 1e-6
    torch.testing.assert_close(e, clustering.embed_text(torch.tensor([3, 1, 2]), table))


def test_paper_protocol_pools_the_padding() -> None:
    table = torch.randn(20, 6)
    padded = clustering.embed_text(torch.tensor([1, 2, 0, 0]), table)
    assert torch.equal(clustering.embed_texts([[1, 2]], table, "paper", 4, 0)[0], padded)
    assert not torch.allclose(clustering.embed_texts([[1, 2]], table, "masked", 4, 0)[0], padded)


def test_ties_go_to_the_lowest_cluster() -> None:
    centroids = torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 0.0]])
    assert clustering.nearest_centroids(torch.tensor([[1.0, 0.0], [0.7, 0.7]]), centroids).tolist() == [1, 0]


def test_no_cluster_is_empty_and_the_seed_decides() -> None:
    points = torch.nn.functional.normalize(torch.randn(60, 5, generator=torch.Generator().manual_seed(3)), dim=1)
    first, again = (clustering.fit_centroids(points, 7, seed=1) for _ in range(2))
    assert torch.equal(first, again)
    assert len(clustering.nearest_centroids(points, first).unique()) == 7


def test_more_clusters_than_different_texts_is_an_error() -> None:
    with pytest.raises(InputError, match="at most --clusters 2"):
        clustering.fit_centroids(torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]), 3, seed=0)


def test_peft_checkpoint_gives_pefts_logits(mini: Checkpoint, mini_path: Path, tmp_path: Path) -> None:
    import copy

    import peft

    torch.manual_seed(1)
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["lm_head"], lora_dropout=0.0)
    untied = copy.deepcopy(mini.trunk.causal_lm)
    untied.config.tie_word_embeddings = False
    untied.lm_head.weight = torch.nn.Parameter(untied.lm_head.weight.detach().clone())
    model: Any = peft.get_peft_model(untied, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    model.eval().save_pretrained(tmp_path / "adapter")

    checkpoint = load_checkpoint(tmp_path / "adapter", base=str(mini_path / "base"))
    assert (checkpoint.config.regime, checkpoint.config.rank, checkpoint.config.alpha) == ("lora", 3, 2.0)
    ids = [5, 6, 7, 8]
    adaptation = inference.adapt(checkpoint, [ids], "static")
    expected = model(input_ids=torch.tensor([ids])).logits[0]
    torch.testing.assert_close(row_logits(checkpoint, ids, adaptation, 0), expected, rtol=1e-4, atol=1e-4)


def test_peft_with_another_target_is_refused(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["c_attn"],
                    "base_model_name_or_path": "gpt2"})
    )  # fmt: skip
    with pytest.raises(CheckpointError, match="single target is lm_head"):
        load_checkpoint(tmp_path)


def test_authors_state_dict_gives_the_same_factors(mini: Checkpoint, mini_path: Path, tmp_path: Path) -> None:
    assert isinstance(mini.factors, Hypernetwork)
    state = {"transformer.wte.weight": torch.zeros(2, 2)}  # other tensors of the script are not ours to read
    for index, theirs in enumerate(("0", "3", "6")):
        layer = mini.factors.linears()[index]
        state |= {f"lm_head.hyper_net.{theirs}.{kind}": getattr(layer, kind) for kind in ("weight", "bias")}
    torch.save(state, tmp_path / "model.pt")
    checkpoint = load_checkpoint(tmp_path / "model.pt", base=str(mini_path / "base"))
    u = torch.randn(2, 64)
    expected = mini.factors(u)
    for name, factor in checkpoint.factors(u).items():
        assert torch.equal(factor, expected[name])
    assert (checkpoint.config.protocol, checkpoint.config.num_clusters) == ("paper", 0)


def test_a_pickle_with_code_is_never_run(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path(tmp_path / "ran").touch, ())

    torch.save({"lm_head.hyper_net.0.weight": Bomb()}, tmp_path / "bomb.pt")
    with pytest.raises(CheckpointError, match="weights_only"):
        load_checkpoint(tmp_path / "bomb.pt", base="unused")
    assert not (tmp_path / "ran").exists()


def _edit_config(**changes: Any) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        file = path / "chameleon_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return edit


def _edit_tensor(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        file = path / "chameleon.safetensors"
        tensors = load_file(file)
        tensors[name] = change(tensors[name]).contiguous()
        save_file(tensors, file)

    return edit


def _truncate(path: Path) -> None:
    file = path / "chameleon.safetensors"
    file.write_bytes(file.read_bytes()[:1000])


def _other_family(path: Path) -> None:
    file = path / "base" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_type": "opt"}))


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (_edit_config(format_version=2), VersionError, "format_version 2"),
        (_edit_config(regime="full"), CheckpointError, "regime"),
        (_edit_config(surprise=1), CheckpointError, "surprise"),
        (_edit_config(num_clusters=5), TensorError, "centroids"),
        (_edit_config(rank=8), TensorError, "rank-8"),
        (_edit_config(base_model="./gone"), CheckpointError, "--base"),
        (_edit_tensor("centroids", lambda t: t * float("nan")), TensorError, "centroids holds NaN"),
        (_edit_tensor("hypernetwork.0.weight", lambda t: t * float("inf")), TensorError, "hypernetwork.0.weight"),
        (_edit_tensor("hypernetwork.1.bias", lambda t: t[:-1]), TensorError, "hypernetwork.1.bias has shape"),
        (_edit_tensor("hypernetwork.1.bias", lambda t: t.to(torch.int64)), TensorError, "dtype"),
        (_truncate, CheckpointError, "chameleon.safetensors"),
        (lambda path: (path / "chameleon.safetensors").unlink(), CheckpointError, "is missing"),
        (lambda path: (path / "chameleon_config.json").write_text("{"), CheckpointError, "chameleon_config.json"),
        (lambda path: (path / "chameleon_config.json").unlink(), CheckpointError, "not a checkpoint"),
        (_other_family, UnsupportedBaseError, "'opt'"),
    ],
)
def test_bad_checkpoints(
    damage: Callable[[Path], None],
    error: type[ChameleonError],
    message: str,
    mini_path: Path,
    copy_of: Callable[[Path], Path],
) -> None:
    path = copy_of(mini_path)
    damage(path)
    with pytest.raises(error, match=message):
        load_checkpoint(path)


def test_missing_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        load_checkpoint(tmp_path / "nowhere")
