"""The column C++ of docs/features.md: generate, stream and engine in C++ give Python's tokens, or its error."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import chameleon_deploy
from chameleon_deploy import Adapt, Generate, Runtime, Sampling, StructuredOutputs
from chameleon_deploy.errors import ChameleonError
from tests.cpp.c_interface import BUILD
from tests.features import PLAIN, PROMPTS, Use, table, uses
from tests.shared_data import adapted_bundle, good_bundle


def call_native(bundle: Path, use: Use, mode: str | None) -> dict[str, Any]:
    """Return what generate, stream and engine give: token ids of each row, or the error's code and message."""
    adapt, sampling = dict(use.adapt), {**PLAIN, **use.sampling}
    if "factors" in adapt:
        adapt["rank"] = len(adapt.pop("factors")["lm_head.lora_A"])
    if "logit_bias" in sampling:
        sampling["logit_bias"] = list(sampling["logit_bias"].items())
    call = {"prompts": PROMPTS, "max_new_tokens": 8, "sampling": [sampling] * 3, "mode": mode, **use.generate, **adapt}
    if "masks" in use.sampling:
        call["sampling"] = [{**sampling, "masks": masks} for masks in sampling.pop("masks")]
    program = [str(BUILD / "tests" / "chameleon_calls"), str(bundle)]
    output = subprocess.run(program, input=json.dumps(call) + "\n", check=True, capture_output=True, text=True).stdout
    found: dict[str, Any] = json.loads(output)
    assert found.keys() == {"generate", "stream", "engine"}
    return found


@pytest.mark.parametrize("feature", [feature for feature in table() if not feature.endswith("in int8")])
def test_a_feature(feature: str, tmp_path: Path) -> None:
    constrained = feature == "structured outputs"
    assert table()[feature]["C++"] == ("masks of the caller, `allowed_tokens" if constrained else "yes")
    for use in uses()[feature]:
        is_adapted = use.bundle in ("adapters", "activated")
        bundle = adapted_bundle(use.bundle, tmp_path) if is_adapted else good_bundle(use.bundle)
        mode = "centroid" if use.bundle == "chameleon_masked" else None
        sampling = [Sampling(**{**PLAIN, **use.sampling})] * len(PROMPTS)
        generate = Generate(**{"max_new_tokens": 8, "sampling": sampling, **use.generate})
        runtime = chameleon_deploy.load(bundle, threads=1)
        expected = [row.token_ids for row in runtime.generate(PROMPTS, generate, Adapt(**{"mode": mode, **use.adapt}))]
        if constrained:
            use = use._replace(sampling={"masks": recorded_masks(runtime, sampling, expected)})
        for call, found in call_native(bundle, use, mode).items():
            assert found == expected, call


OUTPUTS = (
    StructuredOutputs(json={"type": "object", "properties": {"a": {"enum": ["x", 1]}}, "additionalProperties": False}),
    StructuredOutputs(regex="[ab]{1,30}"),
    StructuredOutputs(grammar='start: "[" item ("," item){3,9} "]"\nitem: "ab" | /[0-9]{2}/'),
)


@pytest.mark.parametrize("sampling", [{}, {"ignore_eos": True}, {"logprobs": 2, "stop_token_ids": [9], "top_p": 0.9}])
@pytest.mark.parametrize("generate", [{}, {"n": 3}, {"prompt_lookup_num_tokens": 4}])
def test_recorded_masks_give_the_same_tokens(sampling: dict[str, Any], generate: dict[str, Any]) -> None:
    """A mask of another row, or one too late or too early, would be one that was not recorded."""
    bundle = good_bundle("chameleon_masked")
    runtime = chameleon_deploy.load(bundle, threads=1, mode="centroid")
    samplings = [Sampling(**{**PLAIN, **sampling, "structured_outputs": outputs}) for outputs in OUTPUTS]
    n = generate.get("n", 1)
    found = runtime.generate(PROMPTS, Generate(**{"max_new_tokens": 40, "sampling": samplings, **generate}))
    expected = [row.token_ids for row in found]
    masks = recorded_masks(runtime, samplings, expected)
    use = Use({"max_new_tokens": 40, **generate}, {**sampling, "masks": masks})
    for call, native in call_native(bundle, use, "centroid").items():
        assert native == expected, call
    use.sampling["masks"] = [masks[1], masks[0], masks[2]]
    for native in call_native(bundle, use, "centroid").values():
        assert native != expected
    use.sampling["masks"] = [{**mask, "vocab_size": 600} for mask in masks]
    message = f"allowed_tokens gave 600 flags for a vocabulary of {masks[0]['vocab_size']} tokens"
    failed = {"code": "input_invalid", "message": message}
    ended: list[list[int]] = [[] for _ in expected]  # an engine's rows, each by its error
    assert call_native(bundle, use, "centroid") == {"generate": failed, "stream": failed, "engine": ended}
    assert len(expected) == 3 * n


def recorded_masks(runtime: Runtime, samplings: list[Sampling], rows: list[list[int]]) -> list[dict[str, Any]]:
    """Return the masks of each prompt's rows, by the tokens before them."""
    n, vocab_size, found = len(rows) // len(samplings), runtime.manifest.model.vocab_size, []
    for i, sampling in enumerate(samplings):
        masks: dict[tuple[int, ...], list[int]] = {}
        for ids in rows[i * n : (i + 1) * n]:
            mask = runtime.new_mask(sampling)
            assert mask is not None
            for place, token_id in enumerate(ids):
                masks[tuple(ids[:place])] = np.flatnonzero(mask.allowed()).tolist()
                mask.append(token_id)
        found.append({"vocab_size": vocab_size, "masks": [[list(ids), allowed] for ids, allowed in masks.items()]})
    return found


def test_prompt_lookup_in_int8(mini_bundles: dict[str, Path]) -> None:
    use = Use(generate={"prompt_lookup_num_tokens": 4})
    with pytest.raises(ChameleonError) as refused:
        chameleon_deploy.load(mini_bundles["int8"], threads=1).generate(PROMPTS, Generate(**use.generate))
    assert refused.value.code == table()["prompt lookup in int8"]["C++"].strip("`")
    for found in call_native(mini_bundles["int8"], use, None).values():
        assert found == {"code": refused.value.code, "message": str(refused.value)}
