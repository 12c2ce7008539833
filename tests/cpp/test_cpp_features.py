"""The column C++ of docs/features.md: generate, stream and engine in C++ give Python's tokens, or its error."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

import chameleon_deploy
from chameleon_deploy import Adapt, Generate, Sampling
from chameleon_deploy.errors import ChameleonError
from tests.cpp.c_interface import BUILD
from tests.features import PLAIN, PROMPTS, Use, table, uses
from tests.shared_data import adapter_case, good_bundle, read


def call_native(bundle: Path, use: Use, mode: str | None) -> dict[str, Any]:
    """Return what generate, stream and engine give: token ids of each row, or the error's code and message."""
    adapt, sampling = dict(use.adapt), {**PLAIN, **use.sampling}
    if "factors" in adapt:
        adapt["rank"] = len(adapt.pop("factors")["lm_head.lora_A"])
    if "logit_bias" in sampling:
        sampling["logit_bias"] = list(sampling["logit_bias"].items())
    call = {"prompts": PROMPTS, "max_new_tokens": 8, "sampling": [sampling] * 3, "mode": mode, **use.generate, **adapt}
    program = [str(BUILD / "tests" / "chameleon_calls"), str(bundle)]
    output = subprocess.run(program, input=json.dumps(call) + "\n", check=True, capture_output=True, text=True).stdout
    found: dict[str, Any] = json.loads(output)
    assert found.keys() == {"generate", "stream", "engine"}
    return found


@pytest.mark.parametrize("feature", [feature for feature in table() if not feature.endswith("in int8")])
def test_a_feature(feature: str, tmp_path: Path) -> None:
    assert table()[feature]["C++"] == "yes"
    for use in uses()[feature]:
        bundle = (
            good_bundle(use.bundle) if use.bundle != "adapters" else adapter_case(read("adapters.json")[0], tmp_path)[0]
        )
        mode = "centroid" if use.bundle == "chameleon_masked" else None
        sampling = [Sampling(**{**PLAIN, **use.sampling})] * len(PROMPTS)
        generate = Generate(**{"max_new_tokens": 8, "sampling": sampling, **use.generate})
        runtime = chameleon_deploy.load(bundle, threads=1)
        expected = [row.token_ids for row in runtime.generate(PROMPTS, generate, Adapt(**{"mode": mode, **use.adapt}))]
        for call, found in call_native(bundle, use, mode).items():
            assert found == expected, call


def test_prompt_lookup_in_int8(mini_bundles: dict[str, Path]) -> None:
    use = Use(generate={"prompt_lookup_num_tokens": 4})
    with pytest.raises(ChameleonError) as refused:
        chameleon_deploy.load(mini_bundles["int8"], threads=1).generate(PROMPTS, Generate(**use.generate))
    assert refused.value.code == table()["prompt lookup in int8"]["C++"].strip("`")
    for found in call_native(mini_bundles["int8"], use, None).values():
        assert found == {"code": refused.value.code, "message": str(refused.value)}
