"""Adapters by name, and adapters from files: loaded, refused and unloaded while others run."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from safetensors.numpy import load_file, save_file

import chameleon_deploy
from chameleon_deploy import Runtime
from chameleon_deploy.contract.adapter_file import read_adapter, write_adapter
from chameleon_deploy.contract.peft_lora import MAX_CONFIG_BYTES, read_peft
from chameleon_deploy.errors import (
    AdapterError,
    ChameleonError,
    CheckpointError,
    DownloadError,
    InputError,
    MissingFileError,
    ModeError,
    NumericError,
    TensorError,
)
from chameleon_deploy.export.exporter import export_bundle
from chameleon_deploy.reference.adapters import load_adapted
from chameleon_deploy.runtime import adapters as adapters_module
from chameleon_deploy.runtime.adapters import AdapterChoice
from chameleon_deploy.runtime.engine.engine import Engine
from tests.adapters import base_model, save_adapter
from tests.commands import run
from tests.file_server import served

PROMPT = [5, 9, 301, 17, 44]
LAYERS = ["q_proj", "v_proj"]


@pytest.fixture(scope="module")
def directories(llama_path: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    path = tmp_path_factory.mktemp("adapters")
    return {
        name: save_adapter(llama_path / "base", path / name, seed, 0.3, r=rank, lora_alpha=4, target_modules=layers)
        for seed, (name, rank, layers) in enumerate(
            (("legal", 4, LAYERS), ("code", 2, LAYERS), ("wiki", 8, ["v_proj"]))
        )
    }


@pytest.fixture(scope="module")
def path(llama_path: Path, directories: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with the first two adapters."""
    own = {name: directories[name] for name in ("legal", "code")}
    out = tmp_path_factory.mktemp("bundle") / "adapters"
    export_bundle(load_adapted(str(llama_path / "base"), own), out)
    return out


@pytest.fixture
def runtime(path: Path) -> Runtime:
    return chameleon_deploy.load(path, threads=1)


@pytest.fixture(scope="module")
def file(path: Path, directories: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The third adapter as a file for the bundle, written by the command."""
    out = tmp_path_factory.mktemp("file") / "wiki.safetensors"
    result = run("chameleon_deploy.adapter", path, "--peft", directories["wiki"], "--out", out)
    assert result.returncode == 0, result.stderr
    assert "2 layers, rank 8" in result.stdout
    return out


def tokens(runtime: Runtime, *adapters: AdapterChoice) -> list[list[int]]:
    generations = runtime.generate([PROMPT] * len(adapters), adapters=adapters, max_new_tokens=8)
    return [generation.token_ids for generation in generations]


def test_rows_choose_adapters_by_name(runtime: Runtime) -> None:
    legal, none, code = tokens(runtime, "legal", None, "code")
    assert [legal], [code] == [tokens(runtime, "legal")[0], tokens(runtime, "code")[0]]
    assert none == runtime.generate([PROMPT], max_new_tokens=8)[0].token_ids  # mode none is the default
    assert len({tuple(ids) for ids in (legal, none, code)}) == 3


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"adapters": ["nobody"]}, AdapterError),
        ({"adapters": "legal"}, InputError),
        ({"adapters": ["legal", "code"]}, InputError),
        ({"adapters": [7]}, InputError),
        ({"adapters": [{"legal": 0.5, "nobody": 0.5}]}, AdapterError),
        ({"adapters": [{"legal": float("nan")}]}, InputError),
        ({"adapters": [{"legal": 1e39}]}, InputError),
        ({"adapters": [{"code": float(np.finfo(np.float32).max)}]}, NumericError),  # a number, but of no sum
        ({"adapters": [{"legal": True}]}, InputError),
        ({"adapters": [{"legal": "1"}]}, InputError),
        ({"adapters": [{7: 1.0}]}, InputError),
        ({"adapters": [{"code": 3e38}]}, NumericError),
        ({"adapters": ["legal"], "mode": "none"}, ModeError),
        ({"adapters": ["legal"], "factors": {}}, ModeError),
        ({"mode": "static"}, ModeError),
    ],
)
def test_what_cannot_be_meant_is_refused(runtime: Runtime, arguments: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        runtime.generate([PROMPT], **arguments)


BLENDS: list[dict[str, float]] = [
    {"legal": 0.7, "code": 0.3}, {"code": -0.5, "wiki": 1.5}, {"legal": 2, "code": 0, "wiki": 0.25}, {"code": 0.5},
]  # fmt: skip


def peft_logprobs(base: Path, directories: dict[str, Path], weights: dict[str, float]) -> Any:
    """Return what PEFT gives with add_weighted_adapter(..., "cat")."""
    model = peft.PeftModel.from_pretrained(base_model(base), directories["legal"], adapter_name="legal")
    for name in weights.keys() - {"legal"}:
        model.load_adapter(directories[name], adapter_name=name)
    model.add_weighted_adapter(list(weights), list(weights.values()), "blend", combination_type="cat")
    model.set_adapter("blend")
    with torch.no_grad():
        logprobs = model.eval()(torch.tensor([PROMPT])).logits[0].log_softmax(-1)
    return [float(row[token_id]) for row, token_id in zip(logprobs, PROMPT[1:], strict=False)]


def test_a_blend_is_pefts_sum_of_updates(
    runtime: Runtime, file: Path, llama_path: Path, directories: dict[str, Path]
) -> None:
    """Of the bundle's own, one of which is padded there, and of a file with other layers; beside plain rows."""
    runtime.load_adapter("wiki", file)
    rows = [*BLENDS, "legal", None]
    scores = runtime.score([PROMPT] * len(rows), adapters=rows)
    for weights, score in zip(BLENDS, scores, strict=False):
        expected = peft_logprobs(llama_path / "base", directories, weights)
        np.testing.assert_allclose(score.token_logprobs, expected, atol=2e-5, err_msg=str(weights))
    plain = [score.token_logprobs for score in runtime.score([PROMPT] * 2, adapters=["legal", None])]
    np.testing.assert_allclose([score.token_logprobs for score in scores[-2:]], plain, atol=1e-5)
    with pytest.raises(AssertionError):  # the comparison tells weights that are exchanged
        wrong = peft_logprobs(llama_path / "base", directories, {"legal": 0.3, "code": 0.7})
        np.testing.assert_allclose(scores[0].token_logprobs, wrong, atol=2e-5)


def test_a_blend_of_one_is_the_adapter_and_of_none_the_base(runtime: Runtime) -> None:
    assert tokens(runtime, {"legal": 1}, {}) == tokens(runtime, "legal", None)
    blends = runtime.adapters.blends([{"code": 1, "legal": 2}, {"legal": 2.0, "code": 1.0}, "legal"])
    assert blends[0].key == blends[1].key != blends[2].key
    sets = blends[0].make(runtime.manifest.adaptation)
    assert next(iter(sets.tensors.values())).shape[1] == 6  # the padding of the second is left out


def test_the_engine_blends_and_a_blend_that_overflows_ends_alone(runtime: Runtime) -> None:
    rows: list[Any] = [{"legal": 0.7, "code": 0.3}, "code", {"code": 3e38}, None]
    (expected, *_) = tokens(runtime, rows[0])
    with Engine(runtime, rows=4, prefill_tokens=8) as engine:
        streams = [engine.submit([PROMPT], adapters=[row], max_new_tokens=8) for row in rows]
        found = [stream.result(60)[0] for i, stream in enumerate(streams) if i != 2]
        with pytest.raises(NumericError):
            raise [token.generation for token in streams[2]][-1].error  # type: ignore[union-attr, misc]
    assert [row.token_ids for row in found] == [expected, *tokens(runtime, "code", None)]


def test_a_blend_stays_within_the_rank_of_the_bundle(
    runtime: Runtime, llama_path: Path, directories: dict[str, Path], tmp_path: Path
) -> None:
    runtime.load_adapter("wiki", directories["wiki"])  # converted for a bundle that takes it
    base = load_adapted(str(llama_path / "base"), {}, adaptable=LAYERS, max_rank=6)
    spec = export_bundle(base, tmp_path / "base").adaptation
    loaded = load_adapted(str(llama_path / "base"), directories, base.trunk)
    runtime = chameleon_deploy.load(tmp_path / "base", threads=1)
    for name in ("legal", "code"):
        write_adapter(tmp_path / f"{name}.safetensors", loaded.adapters[name], spec)
        runtime.load_adapter(name, tmp_path / f"{name}.safetensors")
    more = [f"code{i}" for i in range(10)]
    for name in more:
        runtime.load_adapter(name, tmp_path / "code.safetensors")
    tokens(runtime, {"legal": 0.5, "code": 0.5})  # ranks 4 and 2
    with pytest.raises(AdapterError, match="code, code0, legal have rank 8 together: this bundle takes at most 6"):
        tokens(runtime, {"legal": 0.5, "code": 0.5, "code0": 0.5})
    with pytest.raises(AdapterError, match="code8 have rank 22 together"):  # the first ten names
        tokens(runtime, dict.fromkeys(["code", *more], 1))
    with pytest.raises(TensorError, match=f"{directories['wiki']}: rank 8: this bundle was exported with --max-rank 6"):
        runtime.load_adapter("wiki", directories["wiki"])


def test_an_adapter_knows_its_name_its_file_and_its_uses(runtime: Runtime, file: Path) -> None:
    adapters = runtime.adapters
    runtime.load_adapter("wiki", file)
    wiki, legal = adapters["wiki"], adapters["legal"]
    assert (wiki.name, wiki.digest) == ("wiki", hashlib.sha256(file.read_bytes()).hexdigest())
    assert (legal.name, legal.digest) == ("legal", None)
    blend, _, _ = adapters.blends([{"wiki": 1, "legal": 2}, "legal", None])
    assert blend.names == ("legal", "wiki")
    assert adapters.blends([blend, "legal"])[0] is blend  # counted once
    assert (adapters.uses(wiki), adapters.uses(legal)) == (1, 3)
    runtime.load_adapter("wiki", file, replace=True)
    assert wiki not in adapters
    assert adapters["wiki"] in adapters
    assert (adapters.uses(wiki), wiki.key in adapters._sets) == (0, False)
    adapters.blends(["wiki"])
    wiki = adapters["wiki"]
    runtime.unload_adapter("wiki")
    assert (adapters.uses(wiki), wiki.key in adapters._sets, wiki in adapters) == (0, False, False)


def test_an_error_names_ten_adapters_that_are_loaded(runtime: Runtime, file: Path) -> None:
    for i in range(8):
        runtime.load_adapter(f"wiki{i}", file)
    with pytest.raises(AdapterError, match=r"'nobody': loaded are legal, code, wiki0, .*, wiki7$"):
        runtime.adapters.blends(["nobody"])
    runtime.load_adapter("wiki8", file)
    with pytest.raises(AdapterError, match=r"'nobody': loaded are legal, code, wiki0, .*, wiki7 and 1 more$"):
        runtime.adapters.blends(["nobody"])


def test_the_factors_used_least_recently_leave_first(runtime: Runtime, file: Path) -> None:
    adapters = runtime.adapters

    def kept() -> set[str]:
        return {name for name in adapters.names if adapters[name].file and adapters[name].key in adapters._sets}

    for name in ("one", "two"):
        runtime.load_adapter(name, file)
    adapters.max_bytes = 2 * adapters["one"].size
    adapters.blends(["one"])
    runtime.load_adapter("three", file)
    assert kept() == {"one", "three"}
    adapters.blends(["two"])  # read again, and kept
    assert kept() == {"two", "three"}
    (held,) = adapters.blends(["three"])
    for name in ("one", "two"):
        adapters.blends([name])
    assert kept() == {"one", "two"}
    assert adapters.blends(["three"])[0].parts[0][1] is held.parts[0][1]
    assert kept() == {"three", "two"}


def test_factors_of_an_adapter_that_was_unloaded_are_not_kept(runtime: Runtime, file: Path) -> None:
    """Whether a row still holds them, or they are read once more."""
    runtime.load_adapter("wiki", file)
    (held,) = runtime.adapters.blends(["wiki"])
    ((wiki, sets, _),) = held.parts
    runtime.unload_adapter("wiki")
    assert runtime.adapters.sets_of(wiki) is sets
    assert wiki.key not in runtime.adapters._sets
    del held, sets
    assert runtime.adapters.sets_of(wiki) is not None
    assert wiki.key not in runtime.adapters._sets


def test_peft_directories_at_their_limits(
    runtime: Runtime, llama_bundle: Path, llama_path: Path, directories: dict[str, Path], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("CHAMELEON_DEPLOY_CACHE", str(tmp_path / "cache"))
    shutil.copytree(directories["wiki"], place := tmp_path / "wiki")
    config = place / "adapter_config.json"
    config.write_bytes(config.read_bytes().ljust(MAX_CONFIG_BYTES))
    runtime.load_adapter("wiki", place)
    config.write_bytes(config.read_bytes() + b" ")
    with pytest.raises(CheckpointError, match=f"over {MAX_CONFIG_BYTES} bytes are no LoRA of this model"):
        runtime.load_adapter("other", place)
    with pytest.raises(AdapterError, match="takes no adapters: export its base model"):
        chameleon_deploy.load(llama_bundle, threads=1).load_adapter("wiki", directories["wiki"])
    far = save_adapter(
        llama_path / "base", tmp_path / "far", r=1, target_modules=["q_proj"], alora_invocation_tokens=[3, 100_000]
    )
    with pytest.raises(AdapterError, match=f"{far}: its invocation_tokens hold 100000"):
        runtime.load_adapter("far", far)


def test_a_peft_directory_that_changes_or_cannot_be_read(
    runtime: Runtime, directories: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CHAMELEON_DEPLOY_CACHE", str(tmp_path / "cache"))
    shutil.copytree(directories["wiki"], place := tmp_path / "wiki")

    def read_and_change(directory: Path, *arguments: Any) -> Any:
        factors = read_peft(directory, *arguments)
        with (directory / "adapter_config.json").open("a") as file:
            file.write(" ")
        return factors

    monkeypatch.setattr(adapters_module, "read_peft", read_and_change)
    with pytest.raises(AdapterError, match="has changed while it was read: load it again"):
        runtime.load_adapter("wiki", place)

    def fail(file: Path) -> str:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(adapters_module, "file_sha256", fail)
    with pytest.raises(CheckpointError, match=r"adapter_config\.json: Input/output error"):
        runtime.load_adapter("wiki", place)
    assert runtime.adapters.names == ["legal", "code"]


def test_a_file_becomes_an_adapter_and_is_forgotten(
    runtime: Runtime, file: Path, llama_path: Path, directories: dict[str, Path], tmp_path: Path
) -> None:
    export_bundle(load_adapted(str(llama_path / "base"), directories), tmp_path / "all")
    expected = tokens(chameleon_deploy.load(tmp_path / "all", threads=1), "wiki", "legal", None)
    before = tokens(runtime, "legal")
    runtime.load_adapter("wiki", file)
    assert runtime.adapters.names == ["legal", "code", "wiki"]
    assert tokens(runtime, "wiki", "legal", None) == expected
    for load in (runtime.load_adapter, runtime.adapters.load):
        with pytest.raises(AdapterError, match="already"):
            load("wiki", file)
    runtime.unload_adapter("wiki")
    with pytest.raises(AdapterError, match="wiki"):
        tokens(runtime, "wiki")
    with pytest.raises(AdapterError):
        runtime.unload_adapter("wiki")
    assert tokens(runtime, "legal") == before


def test_adapters_come_from_urls(
    runtime: Runtime, file: Path, directories: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As files, and as PEFT writes them; what is there later replaces what was."""
    monkeypatch.setenv("CHAMELEON_DEPLOY_CACHE", str(tmp_path / "cache"))
    place = tmp_path / "served" / "wiki"
    place.mkdir(parents=True)
    shutil.copy(file, place / "a.safetensors")
    shutil.copytree(directories["wiki"], place / "peft")
    runtime.load_adapter("local", file)
    with served(place.parent) as (url, _):
        runtime.load_adapter("file", f"{url}/a.safetensors")
        runtime.load_adapter("peft", f"{url}/peft")
        local, of_file, of_peft, legal = tokens(runtime, "local", "file", "peft", "legal")
        assert of_file == of_peft == local != legal
        shutil.copytree(directories["legal"], place / "peft", dirs_exist_ok=True)
        assert tokens(runtime, "peft") == [local]
        runtime.load_adapter("peft", f"{url}/peft", replace=True)
        assert tokens(runtime, "peft") == [legal]
        with pytest.raises(MissingFileError, match=r"adapter_config\.json is missing"):
            runtime.load_adapter("nothing", f"{url}/none")
    with pytest.raises(DownloadError):
        runtime.load_adapter("late", f"{url}/peft")
    assert not {"nothing", "late"} & set(runtime.adapters.names)


def test_the_bundles_own_adapters_stay(runtime: Runtime, file: Path) -> None:
    before = tokens(runtime, "legal")
    with pytest.raises(AdapterError, match="bundle's own"):
        runtime.unload_adapter("legal")
    for replace in (False, True):
        with pytest.raises(AdapterError, match="bundle's own"):
            runtime.load_adapter("legal", file, replace=replace)
    assert tokens(runtime, "legal") == before


def test_factors_that_left_the_memory_are_read_again_if_the_file_is_the_same(
    runtime: Runtime, file: Path, tmp_path: Path
) -> None:
    one, other = tmp_path / "one.safetensors", tmp_path / "other.safetensors"
    one.write_bytes(file.read_bytes())
    other.write_bytes(file.read_bytes())
    runtime.adapters.max_bytes = 1
    for name, path in (("one", one), ("other", other)):
        runtime.load_adapter(name, path)
    loaded = runtime.adapters["one"]
    assert loaded.key not in runtime.adapters._sets  # it has left
    assert runtime.adapters["other"].key in runtime.adapters._sets
    assert runtime.adapters["legal"].key in runtime.adapters._sets  # the bundle's own never leave
    expected = tokens(runtime, "other")
    assert tokens(runtime, "one") == expected
    tokens(runtime, "other")
    stamp, raw = one.stat(), bytearray(one.read_bytes())
    raw[-1] ^= 0x40  # of the last float
    with one.open("r+b") as opened:  # in place, with the same size and time
        opened.write(raw)
    os.utime(one, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    with pytest.raises(AdapterError, match="has changed since"):
        tokens(runtime, "one")
    assert tokens(runtime, "other") == expected


def test_factors_that_a_row_holds_are_not_read_again(runtime: Runtime, file: Path, tmp_path: Path) -> None:
    one = tmp_path / "one.safetensors"
    one.write_bytes(file.read_bytes())
    runtime.adapters.max_bytes = 1
    runtime.load_adapter("one", one)
    (held,) = runtime.adapters.blends(["one"])
    runtime.load_adapter("other", file)
    assert runtime.adapters["one"].key not in runtime.adapters._sets
    one.unlink()
    (again,) = runtime.adapters.blends(["one"])
    assert again.parts[0][1] is held.parts[0][1]
    runtime.load_adapter("other", file, replace=True)
    del held, again
    with pytest.raises(AdapterError, match="is not a plain file"):
        runtime.adapters.blends(["one"])


def test_factors_of_a_caller_are_those_of_an_adapter(runtime: Runtime, file: Path) -> None:
    factors = read_adapter(file, runtime.manifest.adaptation).factors
    runtime.load_adapter("wiki", file)
    (generation,) = runtime.generate([PROMPT], mode="static", factors=factors, max_new_tokens=8)
    assert [generation.token_ids] == tokens(runtime, "wiki")


Tensors = dict[str, np.ndarray]
V = "model.layers.1.self_attn.v_proj"


def _damaged(file: Path, out: Path, change: Callable[[Tensors, dict[str, str]], Any]) -> Path:
    raw = file.read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    tensors, metadata = load_file(file), header["__metadata__"]
    change(tensors, metadata)
    save_file(tensors, out, metadata)
    return out


FAULTS: dict[str, tuple[Callable[[Tensors, dict[str, str]], Any], type[ChameleonError]]] = {
    "another base": (lambda tensors, metadata: metadata.update(base_digest="0" * 64), AdapterError),
    "another format": (lambda tensors, metadata: metadata.update(format="pt"), AdapterError),
    "a newer version": (lambda tensors, metadata: metadata.update(format_version="2"), AdapterError),
    "no metadata": (lambda tensors, metadata: metadata.clear(), AdapterError),
    "targets that are no JSON": (lambda tensors, metadata: metadata.update(targets="["), AdapterError),
    "targets of another type": (lambda tensors, metadata: metadata.update(targets="7"), AdapterError),
    "nested targets": (lambda tensors, metadata: metadata.update(targets=json.dumps([[V]])), AdapterError),
    "a target that the bundle lacks": (lambda t, metadata: metadata.update(targets='["lm_head"]'), AdapterError),
    "a missing layer": (lambda tensors, metadata: [tensors.pop(f"{V}.lora_{part}") for part in "AB"], TensorError),
    "a missing B": (lambda tensors, metadata: tensors.pop(f"{V}.lora_B"), TensorError),
    "another tensor": (lambda tensors, metadata: tensors.update(extra=np.zeros(3, np.float32)), TensorError),
    "another width": (
        lambda tensors, metadata: tensors.update({f"{V}.lora_A": np.zeros((8, 65), np.float32)}),
        TensorError,
    ),
    "another rank": (
        lambda tensors, metadata: tensors.update({f"{V}.lora_A": np.zeros((3, 64), np.float32)}),
        TensorError,
    ),
    "no rank": (
        lambda tensors, m: tensors.update({n: np.zeros((0, a.shape[1]), np.float32) for n, a in tensors.items()}),
        TensorError,
    ),
    "a rank beyond the limit": (
        lambda tensors, m: tensors.update({n: np.zeros((1025, a.shape[1]), np.float32) for n, a in tensors.items()}),
        TensorError,
    ),
    "NaN": (lambda tensors, metadata: tensors[f"{V}.lora_A"].fill(np.nan), TensorError),
    "float64": (
        lambda tensors, metadata: tensors.update({f"{V}.lora_A": tensors[f"{V}.lora_A"].astype(np.float64)}),
        TensorError,
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_hostile_file_is_refused_and_nothing_is_loaded(
    fault: str, runtime: Runtime, file: Path, tmp_path: Path
) -> None:
    change, error = FAULTS[fault]
    damaged = _damaged(file, tmp_path / "damaged.safetensors", change)
    with pytest.raises(error):
        runtime.load_adapter("wiki", damaged)
    assert runtime.adapters.names == ["legal", "code"]


def test_what_is_no_adapter_file_is_refused(runtime: Runtime, file: Path, tmp_path: Path) -> None:
    cut, claims = tmp_path / "cut.safetensors", tmp_path / "claims.safetensors"
    cut.write_bytes(file.read_bytes()[:-1])
    header = b'{"a":{"dtype":"F32","shape":[1000000000,1000000000],"data_offsets":[0,4]}}'
    claims.write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 4)
    link = tmp_path / "link.safetensors"
    link.symlink_to(file)
    for wrong in (cut, claims, link, tmp_path / "missing", Path("/dev/zero")):
        with pytest.raises(AdapterError):
            runtime.load_adapter("wiki", wrong)
    with pytest.raises(CheckpointError, match=r"adapter_config\.json is missing"):
        runtime.load_adapter("wiki", tmp_path)
    for name in ("", "a/b", "../wiki", "a:b", "x" * 65):
        with pytest.raises(InputError):
            runtime.load_adapter(name, file)


def test_a_bundle_without_adapters_takes_no_file(llama_bundle: Path, file: Path) -> None:
    with pytest.raises(AdapterError, match="takes no adapters"):
        chameleon_deploy.load(llama_bundle, threads=1).load_adapter("wiki", file)


def test_a_written_file_is_read_again(runtime: Runtime, file: Path, tmp_path: Path) -> None:
    factors = read_adapter(file, runtime.manifest.adaptation).factors
    write_adapter(tmp_path / "again.safetensors", factors, runtime.manifest.adaptation)
    again = read_adapter(tmp_path / "again.safetensors", runtime.manifest.adaptation).factors
    assert all(np.array_equal(again[name], array) for name, array in factors.items())


def test_the_engine_serves_adapters_while_others_come_and_go(runtime: Runtime, file: Path) -> None:
    """No request of another adapter is lost or changed while a file is loaded and unloaded all the time."""
    names = ["legal", None, "code"]
    expected = dict(zip(names, tokens(runtime, *names), strict=True))
    runtime.load_adapter("wiki", file)
    (wiki,) = tokens(runtime, "wiki")
    runtime.unload_adapter("wiki")
    failures: list[Any] = []
    with Engine(runtime, rows=4, max_waiting=256, prefill_tokens=8) as engine:

        def ask(name: str | None) -> None:
            for _ in range(3):
                stream = engine.submit([PROMPT], adapters=[name], max_new_tokens=8)
                found = [token.generation for token in stream][-1]
                if found is None or found.token_ids != expected[name]:
                    failures.append((name, found))

        threads = [threading.Thread(target=ask, args=(names[i % 3],)) for i in range(16)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            runtime.load_adapter("wiki", file)
            stream = engine.submit([PROMPT], adapters=["wiki"], max_new_tokens=8)
            runtime.unload_adapter("wiki")  # its rows keep it
            found = [token.generation for token in stream][-1]
            if found is None or found.token_ids != wiki:
                failures.append(("wiki", found))
        with pytest.raises(AdapterError):
            engine.submit([PROMPT], adapters=["wiki"])
    assert not failures


def test_inspect_names_adapters_and_layers(path: Path) -> None:
    shown = run("chameleon_deploy.inspect", path)
    assert "legal, code" in shown.stdout, shown.stderr
    assert "model.layers.*.self_attn.v_proj [32 x 64] in 2 layers" in shown.stdout


def test_the_command_takes_adapters(path: Path, runtime: Runtime) -> None:
    arguments = ["--prompt", "one", "--prompt", "two", "--adapter", "legal", "--adapter", "", "--json"]
    result = run("chameleon_deploy.generate", path, *arguments)
    assert result.returncode == 0, result.stderr
    found = [json.loads(line)["token_ids"] for line in result.stdout.splitlines()]
    expected = runtime.generate(["one", "two"], adapters=["legal", None])
    assert found == [generation.token_ids for generation in expected]
    blended = run("chameleon_deploy.generate", path, *arguments[:2], "--adapter", "legal=0.7,code=-2", "--json")
    (generation,) = runtime.generate(["one"], adapters=[{"legal": 0.7, "code": -2}])
    assert json.loads(blended.stdout)["token_ids"] == generation.token_ids, blended.stderr
    for option in ("legal=", "legal=1,legal=2", "legal=1,code", "=1", "legal=inf"):
        assert run("chameleon_deploy.generate", path, *arguments[:2], "--adapter", option).returncode == 2, option
    wrong = run("chameleon_deploy.generate", path, "--prompt", "one", "--adapter", "nobody")
    assert (wrong.returncode, "[adapter_invalid]" in wrong.stderr) == (2, True)


def test_the_command_loads_adapters(path: Path, directories: dict[str, Path], file: Path, runtime: Runtime) -> None:
    one, two = (("--load-adapter", f"wiki={source}") for source in (file, directories["wiki"]))
    arguments = ["--prompt", "one", "--adapter", "wiki", "--json"]
    runtime.load_adapter("wiki", file)
    (expected,) = runtime.generate(["one"], adapters=["wiki"])
    for loaded in (one, two):
        result = run("chameleon_deploy.generate", path, *arguments, *loaded)
        assert result.returncode == 0, result.stderr
        assert json.loads(result.stdout)["token_ids"] == expected.token_ids
    texts = file.with_name("texts.txt")
    texts.write_text("one two three")
    result = run("chameleon_deploy.score", path, "--text", texts, *arguments[2:], *one)
    (score,) = runtime.score(["one two three"], adapters=["wiki"])
    assert json.loads(result.stdout)["token_logprobs"] == pytest.approx(score.token_logprobs), result.stderr
    for wrong in ([*one, *two], ["--load-adapter", "wiki"], ["--load-adapter", f"legal={file}"]):
        refused = run("chameleon_deploy.generate", path, *arguments, *wrong)
        assert (refused.returncode, refused.stderr.count("\n")) == (2, 1), refused.stderr
