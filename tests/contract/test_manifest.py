"""bundle.json at its limits: the last value that is accepted, and the first that is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from chameleon_deploy.contract.bundle import open_bundle
from chameleon_deploy.contract.manifest import (
    LimitsSpec,
    Manifest,
    available_modes,
    default_mode,
    limits_fault,
    parse_manifest,
)
from chameleon_deploy.errors import ChameleonError, ManifestError, PathError
from tests.damage import changed
from tests.shared_data import good_bundle

GOOD = json.loads((good_bundle("chameleon_masked") / "bundle.json").read_text())
LORA = json.loads((good_bundle("lora_masked") / "bundle.json").read_text())
WEIGHTS = GOOD["files"]["weights.bin"]["size"]
EMBEDDING = 4 * GOOD["model"]["vocab_size"] * GOOD["model"]["hidden_size"]


def parse(manifest: Any, **changes: Any) -> Manifest:
    """Parse a manifest after changes."""
    return parse_manifest(json.dumps(changed(manifest, **changes)).encode(), Path("bundle.json"))


def refused(manifest: Any, **changes: Any) -> str:
    with pytest.raises(ManifestError) as error:
        parse(manifest, **changes)
    return str(error.value)


@pytest.mark.parametrize(
    ("name", "accepted", "not_accepted"),
    [
        ("model__max_positions", 2**31 - 1, 2**31),
        ("model__num_layers", 2**31 - 1, 2**31),
        ("model__num_layers", 1, 0),
        ("model__head_dim", 2**31 - 1, 2**31),
        ("model__head_dim", 1, 0),
        ("model__eos_token_id", 0, -1),
        ("model__eos_token_id", GOOD["model"]["vocab_size"] - 1, GOOD["model"]["vocab_size"]),
        ("model__num_attention_heads", 4, 3),
        ("adaptation__rank", 1, 0),
        ("adaptation__rank", 2**63 - 1, 2**63),
        ("adaptation__max_length", 1, 0),
        ("adaptation__num_clusters", 0, -1),
        ("limits__batch", 1, 0),
        ("limits__sequence", GOOD["model"]["max_positions"], GOOD["model"]["max_positions"] + 1),
        ("limits__past", GOOD["model"]["max_positions"] - 1, GOOD["model"]["max_positions"]),
        ("token_embedding__offset", 0, -1),
        ("token_embedding__offset", WEIGHTS - EMBEDDING, WEIGHTS - EMBEDDING + 1),
        ("parameters__base", -(2**63), -(2**63) - 1),
        ("files__weights.bin__size", EMBEDDING + GOOD["token_embedding"]["offset"],
         EMBEDDING + GOOD["token_embedding"]["offset"] - 1),
    ],
)  # fmt: skip
def test_numbers(name: str, accepted: int, not_accepted: int) -> None:
    parse(GOOD, **{name: accepted})
    refused(GOOD, **{name: not_accepted})


def test_a_half_precision_embedding_is_half_as_long() -> None:
    half = {**GOOD["token_embedding"], "dtype": "float16", "offset": WEIGHTS - EMBEDDING // 2}
    parse(GOOD, token_embedding=half)
    refused(GOOD, token_embedding={**half, "offset": half["offset"] + 1})


@pytest.mark.parametrize("name", ["a", "_a", "-a", "0", "A.b-c_d", "x" * 255])
def test_plain_names(name: str) -> None:
    files = {**GOOD["files"], name: {"size": 0, "sha256": ""}}
    assert name in parse(GOOD, files=files).files
    for wrong in (f"{name}/", f".{name}", f"{name}\n", f"{name} ", "x" * 256, ""):
        with pytest.raises(PathError):
            parse(GOOD, files={**GOOD["files"], wrong: {"size": 0, "sha256": ""}})


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "parity.json", "weights.bin", "decoder.onnx", "centroids.safetensors"]
)
def test_files_that_every_bundle_needs(name: str) -> None:
    assert f"'{name}' is needed" in refused(GOOD, files={k: v for k, v in GOOD["files"].items() if k != name})


def test_files_that_some_bundles_need() -> None:
    without = {name: spec for name, spec in GOOD["files"].items() if name != "centroids.safetensors"}
    assert parse(GOOD, adaptation__num_clusters=0, files=without).adaptation.modes == ("none", "static", "request")
    without = {name: spec for name, spec in LORA["files"].items() if name != "lora.safetensors"}
    assert "'lora.safetensors' is needed" in refused(LORA, files=without)


def test_roles_that_a_regime_needs() -> None:
    graphs = {name: graph for name, graph in GOOD["graphs"].items() if name != "hypernetwork"}
    assert "'hypernetwork'" in refused(GOOD, graphs=graphs)
    assert all(graph.role != "hypernetwork" for graph in parse(LORA).graphs.values())
    for manifest in (GOOD, LORA):
        graphs = {name: graph for name, graph in manifest["graphs"].items() if graph["role"] != "decoder"}
        assert "'decoder'" in refused(manifest, graphs=graphs)


def test_a_cache_is_what_a_decoder_has() -> None:
    assert "cache" in refused(GOOD, graphs__decoder__cache=None)
    assert "cache" in refused(GOOD, graphs__chooser__cache="growing")


def test_targets() -> None:
    head = {"name": "lm_head", "in_features": 16, "out_features": 320}
    other = {"name": "h", "in_features": 1, "out_features": 1}
    assert len(parse(GOOD, adaptation__targets=[head, other]).adaptation.targets) == 2
    for wrong in ({**other, "name": ""}, {**other, "in_features": 0}, {**other, "out_features": 0}, head,
                  {**head, "in_features": 15}, {**head, "out_features": 321}):  # fmt: skip
        assert "adaptation.targets" in refused(GOOD, adaptation__targets=[head, wrong])
    assert "adaptation.targets" in refused(GOOD, adaptation__targets=[])
    assert "rank" in refused(LORA, adaptation__rank=0)
    for wrong in ({**head, "in_features": 15}, {**head, "out_features": 321}):
        assert "lm_head is not [hidden_size, vocab_size]" in refused(GOOD, adaptation__targets=[wrong])


def test_a_basis_is_what_an_int8_trunk_needs() -> None:
    head, other = GOOD["adaptation"]["targets"][0], {"name": "h", "in_features": 1, "out_features": 1}
    files = {**GOOD["files"], "basis.safetensors": {"size": 0, "sha256": ""}}
    for precision, targets, needed in (("int8", [head], False), ("int8", [head, other], True), ("int8", [other], True),
                                       ("fp32", [head, other], False)):  # fmt: skip
        changes = {"precision": precision, "adaptation__targets": targets}
        assert parse(GOOD, files=files, **changes).has_basis is needed
        if needed:
            assert "'basis.safetensors' is needed" in refused(GOOD, **changes)
        else:
            parse(GOOD, **changes)


def test_a_size_of_conditioning_goes_with_a_hypernetwork_and_no_clusters() -> None:
    assert parse(GOOD).adaptation.conditioning_size == 0
    for size in (1, 2**31 - 1):
        given = parse(GOOD, adaptation__num_clusters=0, adaptation__conditioning_size=size)
        assert given.adaptation.conditioning_size == size
        assert "conditioning_size" in refused(GOOD, adaptation__conditioning_size=size)
        assert "conditioning_size" in refused(LORA, adaptation__conditioning_size=size, adaptation__num_clusters=0)
    for size in (-1, 2**31):
        assert "conditioning_size" in refused(GOOD, adaptation__num_clusters=0, adaptation__conditioning_size=size)


def test_adapters_have_names_and_a_base() -> None:
    named = {"adaptation__adapters": ["a", "B.c-d_9", "x" * 64], "adaptation__base_digest": "0"}
    adaptation = parse(LORA, **named).adaptation
    assert adaptation.adapters == ("a", "B.c-d_9", "x" * 64)
    assert default_mode(adaptation) == "none"
    assert "base_digest" in refused(LORA, adaptation__adapters=["a"])
    assert "base_digest" in refused(LORA, adaptation__base_digest="0")
    assert "regime 'lora'" in refused(GOOD, **named)
    for names in (["a", "a"], [""], [".a"], ["-a"], ["a b"], ["a", "static"], ["x" * 65], ["a\n"]):
        assert "distinct names" in refused(LORA, adaptation__adapters=names, adaptation__base_digest="0")


def test_invocation_tokens_are_of_adapters_and_of_the_vocabulary() -> None:
    named = {"adaptation__adapters": ["a", "b"], "adaptation__base_digest": "0"}
    adaptation = parse(LORA, **named, adaptation__invocation_tokens={"b": [3, 0]}).adaptation
    assert adaptation.invocation_tokens == {"b": (3, 0)}
    assert parse(LORA, **named).adaptation.invocation_tokens == {}
    assert "'c', which is no adapter" in refused(LORA, **named, adaptation__invocation_tokens={"c": [3]})
    for tokens in ([], [3] * 257, [-1], [10**6]):
        assert "tokens of the vocabulary" in refused(LORA, **named, adaptation__invocation_tokens={"a": tokens})


def test_a_base_has_a_digest_and_what_later_adapters_update() -> None:
    base = {"adaptation__regime": "base", "adaptation__base_digest": "0"}
    files = {name: spec for name, spec in LORA["files"].items() if name != "lora.safetensors"}
    assert parse(LORA, files=files, **base).adaptation.modes == ("none", "static")
    plain = parse(LORA, files=files, **base, adaptation__targets=[], adaptation__rank=0)
    assert plain.adaptation.modes == ("none",)
    assert default_mode(plain.adaptation) == "none"
    assert "base_digest" in refused(LORA, adaptation__regime="base")
    assert "regime 'lora'" in refused(LORA, **base, adaptation__adapters=["a"])
    assert "rank" in refused(LORA, **base, adaptation__rank=0)
    assert "rank" in refused(LORA, **base, adaptation__targets=[], adaptation__rank=-1)


MODEL = GOOD["model"]
INT8 = {**GOOD["token_embedding"], "dtype": "int8", "offset": WEIGHTS - EMBEDDING // 4, "row_scales_offset": 0,
        "channel_scales_offset": WEIGHTS - 4 * MODEL["hidden_size"], "rotation": 16}  # fmt: skip


def test_an_int8_embedding_has_scales_in_its_file_and_a_rotation() -> None:
    assert parse(GOOD, token_embedding=INT8).token_embedding.rotation == 16
    last = {name: WEIGHTS - 4 * MODEL[size] for name, size in (
        ("row_scales_offset", "vocab_size"), ("channel_scales_offset", "hidden_size"))}  # fmt: skip
    for name, offset in last.items():
        parse(GOOD, token_embedding={**INT8, name: offset})
        parse(GOOD, token_embedding={**INT8, name: 0})
        for outside in (-1, offset + 1):
            assert "outside" in refused(GOOD, token_embedding={**INT8, name: outside})
    for name in (*last, "rotation"):
        assert "only there" in refused(GOOD, token_embedding={**INT8, name: None})
        assert "only there" in refused(GOOD, token_embedding={**GOOD["token_embedding"], name: 16})


def test_a_rotation_is_a_power_of_four_that_divides_the_channels() -> None:
    assert MODEL["hidden_size"] == 16
    for rotation in (1, 4, 16):
        parse(GOOD, token_embedding={**INT8, "rotation": rotation})
    for rotation in (-4, -1, 0, 2, 3, 5, 8, 12, 64):
        assert "rotation" in refused(GOOD, token_embedding={**INT8, "rotation": rotation})


def test_modes() -> None:
    six = ("none", "static", "centroid", "request", "cohort", "tenant")
    assert available_modes("chameleon", 1) == six
    assert available_modes("chameleon", 0) == ("none", "static", "request")
    assert available_modes("lora", 3) == ("none", "static")
    assert default_mode(parse(GOOD).adaptation) == "cohort"
    assert default_mode(parse(LORA).adaptation) == "static"
    assert default_mode(parse(GOOD, adaptation__num_clusters=0).adaptation) == "request"


def test_limits() -> None:
    model = parse(GOOD).model
    most = model.max_positions
    assert limits_fault(LimitsSpec(1, most, most - 1, 1), model) is None
    for limits in (LimitsSpec(0, 1, 1, 1), LimitsSpec(1, 0, 1, 1), LimitsSpec(1, 1, 0, 1), LimitsSpec(1, 1, 1, 0),
                   LimitsSpec(1, most + 1, 1, 1), LimitsSpec(1, 1, most, 1)):  # fmt: skip
        assert limits_fault(limits, model)


def test_a_manifest_without_figures_has_none() -> None:
    parity = parse(GOOD, parity={"verified": False}).parity
    assert (parity.checks, parity.max_abs_logit_difference, parity.accepted_kl) == (0, None, None)


def test_the_graph_for_fewer_providers_is_preferred() -> None:
    bundle = open_bundle(good_bundle("chameleon_masked"))
    assert bundle.graph("decoder", "cpu") == "decoder_cpu"
    assert bundle.graph("decoder", "cuda") == "decoder"
    with pytest.raises(ChameleonError, match="no decoder graph for provider 'rocm'"):
        bundle.graph("decoder", "rocm")
