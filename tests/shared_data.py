"""Reading tests/data (made by tests/make_data.py); the C++ counterpart is runtime/tests/shared_data.h."""

from __future__ import annotations

import base64
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np

import chameleon_deploy
from chameleon_deploy.contract.bundle import ModelSpec, file_sha256
from chameleon_deploy.runtime.sampling import TokenCounts
from chameleon_deploy.runtime.sampling_settings import Sampling
from tests.rows import head_factors

DATA = Path(__file__).parent / "data"


def read(name: str) -> Any:
    return json.loads((DATA / name).read_text())


def good_bundle(name: str) -> Path:
    return DATA / "bundles" / name


def caller_factors(rank: int, model: ModelSpec) -> dict[str, Any]:
    """A and B of the head that every language computes alike: value i is ((7 i + 3) mod 11 - 5) / 16."""
    values = (((7 * np.arange(rank * (model.hidden_size + model.vocab_size)) + 3) % 11 - 5) / 16).astype(np.float32)
    split = rank * model.hidden_size
    return head_factors(values[:split].reshape(rank, -1), values[split:].reshape(rank, -1))


def long_logits(vocab_size: int) -> Any:
    """Logits that every language computes alike, ties among them: logit i is ((7919 i) mod 10007) / 512."""
    return (7919 * np.arange(vocab_size) % 10007 / 512).astype(np.float32)


def case_logits(case: dict[str, Any]) -> Any:
    """The logits of a case of sampling.json, which are written down or have a formula."""
    return np.array(case["logits"], np.float32) if "logits" in case else long_logits(case["vocab_size"])


def choice_arguments(case: dict[str, Any]) -> tuple[Any, TokenCounts, Sampling, float, Any]:
    """What `choose` takes, of a case of sampling.json. What it does not name is the default."""
    settings = {name: case[name] for name in case if name in Sampling.__dataclass_fields__}
    counts = TokenCounts(case.get("prompt", ()), case.get("generated", ()))
    allowed = None if case.get("allowed") is None else np.array(case["allowed"])
    return case_logits(case), counts, Sampling(**settings), case["u"], allowed


def case_arguments(case: dict[str, Any], model: ModelSpec) -> tuple[list[list[int]], dict[str, Any]]:
    """The batch of a golden case, and how it is adapted."""
    how: dict[str, Any] = {"mode": case["mode"], "tenants": case["tenants"]}
    if case["rank"]:
        how["factors"] = caller_factors(case["rank"], model)
    return case["rows"], how | {name: case.get(name) for name in ("conditioning", "adapt_text")}


def released_answers(directory: Path, calls: list[dict[str, Any]]) -> list[list[list[int]]]:
    """Return the greedy tokens that bundles of a released version give for calls (tests/make_released.py)."""
    answers = []
    for call in calls:
        runtime = chameleon_deploy.load(directory / call["bundle"], threads=1)
        for name, file in call.get("load", {}).items():
            runtime.load_adapter(name, directory / file)
        how = {name: call[name] for name in ("mode", "adapters") if name in call}
        generations = runtime.generate(call["rows"], max_new_tokens=call["max_new_tokens"], **how)
        answers.append([list(generation.token_ids) for generation in generations])
    return answers


def hostile_bundle(case: dict[str, Any], out: Path) -> Path:
    """Copy the good bundle of a case and do to it what the case says."""
    shutil.copytree(good_bundle(case["base"]), out)
    for change in case["changes"]:
        _apply(change, out)
    return out


def adapter_case(case: dict[str, Any], directory: Path) -> tuple[Path, Path]:
    """Return the bundle of a case of adapters.json and the file that is loaded as an adapter."""
    file = directory / "adapter.safetensors"
    file.write_bytes(base64.b64decode(case["base64"]))
    return hostile_bundle(case, directory / "bundle"), file


def adapted_bundle(name: str, directory: Path) -> Path:
    """Return a bundle with an adapter named own: `adapters`, or `activated` by the token 9."""
    case = {"adapters": "good", "activated": "beside_an_activated_adapter"}[name]
    found = next(each for each in read("adapters.json") if each["name"] == case)
    (work := directory / name).mkdir()
    return adapter_case(found, work)[0]


def signed_bundle(case: dict[str, Any], directory: Path) -> tuple[Path, list[Path] | None]:
    """Return the bundle of a case of signatures.json and the files of its trusted keys."""
    for key in read("signatures.json")["keys"]:
        (directory / key["name"]).write_text(key["pem"])
    bundle = hostile_bundle(case, directory / "bundle")
    if case["signature"] is not None:
        (bundle / "bundle.json.sig").write_bytes(base64.b64decode(case["signature"]))
    return bundle, None if case["trusted"] is None else [directory / name for name in case["trusted"]]


def _apply(change: dict[str, Any], bundle: Path) -> None:
    manifest = bundle / "bundle.json"
    file = bundle / change.get("file", "bundle.json")
    match change["do"]:
        case "write":
            file.write_bytes(base64.b64decode(change["base64"]) * change["times"])
        case "append":
            file.write_text(file.read_text() + change["text"])
        case "truncate":
            file.write_bytes(file.read_bytes()[: change["size"]])
        case "flip":
            content = bytearray(file.read_bytes())
            content[change["offset"]] ^= 1
            file.write_bytes(content)
        case "delete":
            file.unlink()
        case "mkdir":
            file.mkdir()
        case "symlink":
            file.symlink_to(change["target"])
        case "redigest":
            content = json.loads(manifest.read_text())
            content["files"][file.name] = {"size": file.stat().st_size, "sha256": file_sha256(file)}
            manifest.write_text(json.dumps(content))
        case "set" | "unset":
            content = json.loads(file.read_text())
            *parents, last = change["path"]
            place = content
            for key in parents:
                place = place[int(key)] if isinstance(place, list) else place[key]
            key = int(last) if isinstance(place, list) else last
            if change["do"] == "set":
                place[key] = change["value"]
            else:
                del place[key]
            file.write_text(json.dumps(content))
        case unknown:
            raise ValueError(unknown)
