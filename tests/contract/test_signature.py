"""The inputs and outputs that graphs must have, of every precision and kind of cache."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from chameleon_deploy.contract.manifest import TensorSpec, parse_manifest
from chameleon_deploy.contract.signature import check_graphs, difference
from chameleon_deploy.errors import ManifestError
from tests.shared_data import good_bundle

GOOD = json.loads((good_bundle("chameleon_masked") / "bundle.json").read_text())
A, B = TensorSpec("a", "float32", ("batch", 3)), TensorSpec("b", "int64", ())


def check(manifest: Any) -> None:
    check_graphs(parse_manifest(json.dumps(manifest).encode(), Path("bundle.json")), Path("bundle.json"))


def with_cache(precision: str, cache: str, providers: list[str], dtype: str) -> Any:
    """A manifest whose only decoder has a cache of an element type."""
    manifest = copy.deepcopy(GOOD)
    graphs = manifest["graphs"]
    decoder = graphs.pop("decoder_cpu") if cache == "shared" else graphs["decoder"]
    graphs.pop("decoder_cpu", None)
    graphs["decoder"] = decoder
    manifest["precision"], decoder["providers"] = precision, providers
    for tensor in decoder["inputs"] + decoder["outputs"]:
        if tensor["name"].startswith(("past_key_values.", "present.")):
            tensor["dtype"] = dtype
    return manifest


@pytest.mark.parametrize(
    ("precision", "cache", "providers", "dtype"),
    [
        ("fp32", "growing", ["cpu"], "float32"),
        ("fp32", "growing", ["cuda"], "float32"),
        ("fp32", "shared", ["cpu"], "float32"),
        ("fp16", "growing", ["cuda"], "float16"),
        ("fp16", "growing", ["cpu", "cuda"], "float32"),
        ("bf16", "growing", ["cuda"], "bfloat16"),
        ("bf16", "growing", ["cpu"], "float32"),
        ("int8", "growing", ["cpu", "cuda"], "float32"),
        ("int8", "growing", ["cuda"], "float32"),
        ("int8", "shared", ["cpu"], "int8"),
        ("int4", "growing", ["cpu", "cuda"], "float32"),
        ("int4", "shared", ["cpu"], "int8"),
    ],
)
def test_the_element_type_of_a_cache(precision: str, cache: str, providers: list[str], dtype: str) -> None:
    check(with_cache(precision, cache, providers, dtype))
    for other in {"float32", "float16", "bfloat16", "int8"} - {dtype}:
        with pytest.raises(ManifestError, match=rf"past_key_values\.0\.key' is {other} .*, not {dtype} "):
            check(with_cache(precision, cache, providers, other))


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_a_shared_cache_has_no_half_precision(precision: str) -> None:
    with pytest.raises(ManifestError, match=f"a shared cache does not exist in precision {precision}"):
        check(with_cache(precision, "shared", ["cuda"], "float32"))


def test_layers_beyond_the_inputs_are_not_listed() -> None:
    """Else a manifest of a kilobyte could ask for gigabytes of names."""
    for more, message in ((0, "past_key_values.2.key' is missing"), (1, "fewer inputs than model.num_layers")):
        manifest = with_cache("fp32", "growing", ["cpu"], "float32")
        manifest["model"]["num_layers"] = len(manifest["graphs"]["decoder"]["inputs"]) + more
        with pytest.raises(ManifestError, match=message):
            check(manifest)


def test_vectors_of_a_caller_are_the_input_of_the_hypernetwork() -> None:
    manifest = copy.deepcopy(GOOD)
    manifest["adaptation"] |= {"num_clusters": 0, "conditioning_size": 5}
    with pytest.raises(ManifestError, match=r"'conditioning' is float32 \[factor_sets, 16\], not .*, 5\]"):
        check(manifest)
    manifest["graphs"]["hypernetwork"]["inputs"][0]["shape"][1] = 5
    check(manifest)


def test_a_scorer_has_the_factors_of_the_head_alone() -> None:
    manifest = copy.deepcopy(GOOD)
    target = {"name": "h", "in_features": 3, "out_features": 4}
    del manifest["graphs"]["decoder_cpu"]
    for graph, rank in (("decoder", "rank"), ("hypernetwork", 2)):
        lists = manifest["graphs"][graph]
        tensors = lists["outputs" if graph == "hypernetwork" else "inputs"]
        for name, width in (("h.lora_A", 3), ("h.lora_B", 4)):
            tensors.append({"name": name, "dtype": "float32", "shape": ["factor_sets", rank, width]})
    manifest["adaptation"]["targets"].append(target)
    check(manifest)
    scorer = manifest["graphs"]["hidden_scorer"]
    manifest["adaptation"]["targets"] = [target]
    for lists in manifest["graphs"].values():
        for kind in ("inputs", "outputs"):
            lists[kind] = [tensor for tensor in lists[kind] if not tensor["name"].startswith("lm_head.")]
    with pytest.raises(ManifestError, match="'factor_ids' is unknown"):
        check(manifest)
    scorer["inputs"] = [tensor for tensor in scorer["inputs"] if tensor["name"] != "factor_ids"]
    check(manifest)


def test_beside_a_shared_cache_sets_of_the_trunk_are_on_one_axis() -> None:
    manifest = copy.deepcopy(GOOD)
    manifest["graphs"] = {name: manifest["graphs"][name] for name in ("decoder_cpu", "hypernetwork")}
    manifest["adaptation"]["targets"].append({"name": "h", "in_features": 3, "out_features": 4})
    decoder, hypernetwork = (manifest["graphs"][name] for name in ("decoder_cpu", "hypernetwork"))
    decoder["inputs"].append({"name": "column_ids", "dtype": "int64", "shape": ["columns"]})
    for name, width in (("h.lora_A", 3), ("h.lora_B", 4)):
        decoder["inputs"].append({"name": name, "dtype": "float32", "shape": ["columns", width]})
        hypernetwork["outputs"].append({"name": name, "dtype": "float32", "shape": ["factor_sets", 2, width]})
    check(manifest)


def test_the_first_difference_is_named() -> None:
    assert difference([A, B], [B, A]) is None
    assert difference([A, B], [B]) == "'a' is missing"
    assert difference([B], [A, B]) == "'a' is unknown"
    assert (
        difference([A], [TensorSpec("a", "int64", ("batch", 3))]) == "'a' is int64 [batch, 3], not float32 [batch, 3]"
    )
    assert difference([A, B], [B, A, A]) == "a name is listed twice"
