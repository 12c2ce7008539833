"""The sources of factors: order of the targets, the start of a training, and parameters that layers share."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from chameleon_deploy.contract.bundle import TargetSpec
from chameleon_deploy.reference.hypernetwork import (
    FactorModule,
    Hypernetwork,
    SharedHypernetwork,
    StaticLoRA,
    factor_set,
    num_parameters,
    place_of,
)

HEAD = TargetSpec("lm_head", 6, 10)


def layers(count: int) -> list[TargetSpec]:
    return [
        target
        for i in range(count)
        for target in (TargetSpec(f"h.{i}.attn.q", 6, 4), TargetSpec(f"h.{i}.mlp.up", 6, 8))
    ]


def sources(rank: int = 2) -> list[FactorModule]:
    targets = [*layers(2), HEAD]
    return [
        Hypernetwork(5, targets, rank, (7, 3)),
        SharedHypernetwork(5, targets, rank, (7, 3)),
        StaticLoRA(targets, rank),
    ]


@pytest.mark.parametrize("index", range(3))
def test_every_target_has_factors_of_its_sizes(index: int) -> None:
    factors = sources()[index].eval()(torch.randn(3, 5))
    assert list(factors)[:2] in (["h.0.attn.q.lora_A", "h.0.attn.q.lora_B"], ["h.0.attn.q.lora_A", "h.0.mlp.up.lora_A"])
    for target in [*layers(2), HEAD]:
        assert factors[f"{target.name}.lora_A"].shape == (3, 2, target.in_features)
        assert factors[f"{target.name}.lora_B"].shape == (3, target.out_features, 2)


def test_the_last_layer_gives_one_target_after_the_other() -> None:
    torch.manual_seed(0)
    targets = [layers(1)[0], HEAD]
    network = Hypernetwork(5, targets, 2, ()).eval()
    u = torch.randn(1, 5)
    flat, factors = network.linears()[0](u)[0], network(u)
    first, second = 2 * (6 + 4), 2 * (6 + 10)
    assert len(flat) == first + second
    assert torch.equal(factors["h.0.attn.q.lora_A"][0], flat[:12].view(2, 6))
    assert torch.equal(factors["h.0.attn.q.lora_B"][0], flat[12:first].view(4, 2))
    assert torch.equal(factors["lm_head.lora_A"][0], flat[first : first + 12].view(2, 6))


def test_a_set_has_alpha_in_it() -> None:
    factors = sources()[0].eval()(torch.randn(2, 5))
    one_set = factor_set(factors, 1, 0.5)
    assert torch.equal(one_set["lm_head.lora_A"], factors["lm_head.lora_A"][1])
    assert torch.equal(one_set["lm_head.lora_B"], 0.5 * factors["lm_head.lora_B"][1].T)


@pytest.mark.parametrize("index", range(3))
def test_a_training_begins_with_the_base_model(index: int) -> None:
    source = sources()[index].eval()
    source.begin_at_base(torch.randn(4, 5))
    for name, factor in source(torch.randn(2, 5)).items():
        assert bool(factor.any()) == name.endswith("lora_A"), name


@pytest.mark.parametrize("kind", [Hypernetwork, SharedHypernetwork])
def test_a_training_begins_with_units_that_tell_clusters_apart(kind: Any) -> None:
    torch.manual_seed(0)
    network = kind(5, layers(2), 2, (7, 3)).eval()
    first = network.linears()[0] if isinstance(network, Hypernetwork) else network.conditioning
    centroids = torch.tensor([0.3, -0.2, 0.5, 0.1, 0.4]) + 0.001 * torch.randn(6, 5)
    assert float(first(centroids).std(0, correction=0).max()) < 0.01
    network.begin_at_base(centroids)
    torch.testing.assert_close(first(centroids).mean(0), torch.zeros(7), rtol=0, atol=1e-3)
    torch.testing.assert_close(first(centroids).std(0, correction=0), torch.ones(7), rtol=0, atol=1e-3)
    before = first.weight.clone()
    network.begin_at_base(centroids[:1])  # one cluster: nothing to tell apart
    assert torch.equal(first.weight, before)


def test_shared_parameters_do_not_grow_with_the_layers() -> None:
    def count(kind: type[Hypernetwork] | type[SharedHypernetwork], number: int) -> int:
        return num_parameters(kind(5, layers(number), 2, (7, 3)))

    assert count(SharedHypernetwork, 9) - count(SharedHypernetwork, 2) == 7 * 7  # an embedding of 7 for each layer
    assert count(Hypernetwork, 9) - count(Hypernetwork, 2) == 7 * 4 * 2 * (6 + 4 + 6 + 8)


def test_shared_layers_differ_by_their_place() -> None:
    torch.manual_seed(0)
    network = SharedHypernetwork(5, layers(2), 2, (7, 3)).eval()
    u = torch.randn(1, 5)
    first, second = (network(u)[f"h.{i}.attn.q.lora_A"] for i in range(2))
    assert not torch.equal(first, second)
    with torch.no_grad():
        network.layer.weight[1] = network.layer.weight[0]
    assert torch.equal(network(u)["h.1.attn.q.lora_A"], first)


def test_places() -> None:
    assert place_of("model.layers.12.self_attn.q_proj") == (12, "self_attn.q_proj")
    assert place_of("transformer.h.0.mlp.c_fc") == (0, "mlp.c_fc")
    assert place_of("lm_head") == (None, "lm_head")
