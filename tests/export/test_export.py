"""The exporter: standard graphs, one copy of the embedding, whole or absent."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

import chameleon_deploy
from chameleon_deploy.contract.bundle import LimitsSpec, open_bundle
from chameleon_deploy.directory import new_directory
from chameleon_deploy.errors import OutputError, OutputExistsError, RecipeError, UnsupportedBaseError
from chameleon_deploy.export.exporter import Publication, export_bundle
from chameleon_deploy.export.recipe import Limits, read_recipe
from chameleon_deploy.export.weights import page_out
from chameleon_deploy.reference import inference
from chameleon_deploy.reference.checkpoint import Checkpoint, load_checkpoint
from chameleon_deploy.reference.description import model_spec
from chameleon_deploy.reference.model import load_trunk
from chameleon_deploy.reference.random import SIZES
from chameleon_deploy.terminal.progress import silent
from chameleon_deploy.verify.data_checks import check_tokenizers
from tests.commands import call
from tests.conftest import REPOSITORY, checkpoint_around
from tests.logits import row_logits
from tests.tokenizer_files import LLAMA_3


@pytest.mark.parametrize(
    ("family", "name"), [("bundle", "decoder"), ("bundle", "hypernetwork"), ("llama_bundle", "decoder")]
)
def test_graphs_are_standard_onnx(request: pytest.FixtureRequest, family: str, name: str) -> None:
    file = request.getfixturevalue(family) / f"{name}.onnx"
    onnx.checker.check_model(str(file), full_check=True)
    model = onnx.load(file, load_external_data=False)
    assert [(o.domain, o.version) for o in model.opset_import] == [("", 20)]
    assert {node.domain for node in model.graph.node} == {""}
    assert not model.functions
    inline = [i for i in model.graph.initializer if i.data_location != onnx.TensorProto.EXTERNAL]
    assert {i.data_type for i in inline} <= {onnx.TensorProto.INT64}  # shapes; weights are never inline


def test_paging_out_changes_no_value(tmp_path: Path) -> None:
    """Whether a tensor is mapped from a file or nobody else has what it holds."""
    values = torch.randn(1 << 20)
    expected = values.clone()
    page_out(values)
    assert torch.equal(values, expected)
    save_file({"values": values}, tmp_path / "values.safetensors")
    mapped = load_file(tmp_path / "values.safetensors")["values"]
    page_out(mapped)
    page_out(mapped[5:9])  # less than a page
    assert torch.equal(mapped, expected)


def test_tensor_names_are_the_contract(bundle: Path) -> None:
    graphs = open_bundle(bundle).manifest.graphs
    inputs = {spec.name: (spec.dtype, spec.shape) for spec in graphs["decoder"].inputs}
    assert inputs["lm_head.lora_A"] == ("float32", ("factor_sets", "rank", 64))
    assert inputs["lm_head.lora_B"] == ("float32", ("factor_sets", "rank", 512))
    assert inputs["factor_ids"] == ("int64", ("batch",))
    assert inputs["past_key_values.1.value"] == ("float32", ("batch", 4, "past", 16))
    assert [spec.name for spec in graphs["hypernetwork"].outputs] == ["lm_head.lora_A", "lm_head.lora_B"]


def test_the_tied_embedding_is_stored_once(bundle: Path, mini: Checkpoint) -> None:
    table = mini.trunk.token_embedding.numpy().tobytes()
    assert (bundle / "weights.bin").read_bytes().count(table) == 1
    numbers = mini.trunk.num_parameters() + open_bundle(bundle).manifest.parameters.hypernetwork
    assert (bundle / "weights.bin").stat().st_size <= 1.02 * 4 * numbers


def test_an_untied_head_is_stored_beside_the_embedding(llama_bundle: Path, llama: Checkpoint) -> None:
    content = (llama_bundle / "weights.bin").read_bytes()
    for table in (llama.trunk.token_embedding, llama.trunk.head_weight):
        assert content.count(table.numpy().tobytes()) == 1
    manifest = open_bundle(llama_bundle).manifest
    assert manifest.parameters.base == llama.trunk.num_parameters()
    rotary = 128 * 16  # cosines and sines of every position
    numbers = manifest.parameters.base + manifest.parameters.hypernetwork + rotary
    assert len(content) <= 1.02 * 4 * numbers


def test_the_manifest_tells_the_truth(bundle: Path, mini: Checkpoint) -> None:
    manifest = open_bundle(bundle).manifest
    assert manifest.parameters.base == mini.trunk.num_parameters()
    assert manifest.parameters.factors == 4 * (64 + 512)
    assert not manifest.parity.verified
    parity = json.loads((bundle / "parity.json").read_text())
    assert parity.keys() == {"verified", "known_answers"}
    assert not parity["verified"]


def test_exports_are_reproducible(bundle: Path, mini: Checkpoint, tmp_path: Path) -> None:
    """But for what is measured: the last bits of a product depend on where its memory is."""
    export_bundle(mini, tmp_path / "again")
    manifests = [open_bundle(path).manifest for path in (bundle, tmp_path / "again")]
    for manifest in manifests:
        del manifest.files["parity.json"]
    assert manifests[0] == manifests[1]


def test_files_are_readable_by_the_service_that_runs_them(bundle: Path) -> None:
    umask = os.umask(0)
    os.umask(umask)
    assert {file.stat().st_mode & 0o777 for file in bundle.iterdir()} == {0o666 & ~umask}


def test_alpha_and_layout_are_folded_in(mini: Checkpoint, tmp_path: Path) -> None:
    import dataclasses

    import msgspec

    checkpoint = dataclasses.replace(mini, config=msgspec.structs.replace(mini.config, alpha=0.25))
    export_bundle(checkpoint, tmp_path / "b")
    runtime = chameleon_deploy.load(tmp_path / "b")
    rows = [[1, 2, 3], [4, 5]]
    ours, theirs = runtime.adapt(rows, mode="request"), inference.adapt(checkpoint, rows, "request")
    lora_B = np.asarray(ours.factors.sets.tensors["lm_head.lora_B"])
    np.testing.assert_allclose(lora_B, 0.25 * theirs.factors["lm_head.lora_B"].numpy().swapaxes(1, 2), atol=1e-6)


@pytest.mark.parametrize(
    ("size", "option"),
    [
        *((size, {}) for size in ("mini", "small", "xl")),
        ("mini", {"n_inner": 100}),
        ("mini", {"tie_word_embeddings": False}),
    ],
)
def test_gpt2_sizes_by_config(size: str, option: dict[str, Any], tmp_path: Path) -> None:
    """Widths, heads and one layer of the smallest and the largest; a small vocabulary keeps it quick."""
    _, hidden, heads = SIZES[size]
    config = transformers.GPT2Config(n_layer=1, n_embd=hidden, n_head=heads, vocab_size=300, n_positions=96,
                                     bos_token_id=0, eos_token_id=0, **option)  # fmt: skip
    checkpoint = checkpoint_around(config)
    export_bundle(checkpoint, tmp_path / "b")
    runtime = chameleon_deploy.load(tmp_path / "b", threads=1)
    rows = [[7] * 96, [5, 9, 200, 3]]
    theirs = inference.adapt(checkpoint, rows, "cohort")
    for row, score in enumerate(runtime.score(rows)):
        logprobs = row_logits(checkpoint, rows[row], theirs, row).log_softmax(-1)
        expected = logprobs[:-1].gather(1, torch.tensor(rows[row][1:])[:, None])[:, 0]
        np.testing.assert_allclose(score.token_logprobs, expected, atol=5e-4)


@pytest.mark.parametrize(
    "option",
    [
        {"activation_function": "relu"},
        {"scale_attn_by_inverse_layer_idx": True},
        {"scale_attn_weights": False},
    ],
)
def test_gpt2_variants_that_would_export_wrongly_are_refused(option: dict[str, Any], mini: Checkpoint) -> None:
    import copy
    import dataclasses

    trunk = copy.copy(mini.trunk)
    trunk.causal_lm = copy.copy(trunk.causal_lm)
    trunk.causal_lm.config = copy.deepcopy(trunk.causal_lm.config)
    trunk.causal_lm.config.update(option)
    with pytest.raises(UnsupportedBaseError, match=next(iter(option))):
        model_spec(dataclasses.replace(mini, trunk=trunk))


def test_an_existing_output_is_left_alone(mini_path: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("x")
    result = call("chameleon_deploy.export", mini_path, "--out", tmp_path / "out")
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert "exists" in result.stderr
    assert [f.name for f in (tmp_path / "out").iterdir()] == ["precious"]


@pytest.mark.parametrize("file", ["weights.bin", "decoder.onnx", "hypernetwork.onnx", "tokenizer.json", "bundle.json"])
def test_killed_between_any_two_files(mini: Checkpoint, tmp_path: Path, file: str) -> None:
    """The process dies as soon as `file` exists: no output, and the next export succeeds."""
    child = os.fork()
    if child == 0:
        import threading

        def watch() -> None:
            while not (tmp_path / ".out.partial" / "out" / file).exists():
                pass
            os.kill(os.getpid(), signal.SIGKILL)

        threading.Thread(target=watch, daemon=True).start()
        with new_directory(tmp_path / "out") as directory:
            from chameleon_deploy.export import exporter

            model = model_spec(mini)
            manifest = exporter._write_files(mini, directory, model, Limits().resolve(model, 4), "fp32", None, silent)
            exporter._write_manifest(directory, manifest, {})
            time.sleep(60)
        os._exit(1)
    os.waitpid(child, 0)
    assert not (tmp_path / "out").exists()
    assert (tmp_path / ".out.partial" / "out" / file).exists()
    export_bundle(mini, tmp_path / "out")
    open_bundle(tmp_path / "out")


def test_an_error_leaves_nothing(mini: Checkpoint, tmp_path: Path) -> None:
    def refuse(path: Path) -> Any:
        open_bundle(path)  # complete when it is verified
        raise ValueError("a gate was missed")

    with pytest.raises(ValueError, match="gate"):
        export_bundle(mini, tmp_path / "out", Publication(refuse))
    assert not list(tmp_path.iterdir())


def test_two_exports_to_one_output(mini: Checkpoint, tmp_path: Path) -> None:
    with new_directory(tmp_path / "out") as directory:
        (directory / "a").write_text("x")
        with pytest.raises(OutputError, match="another process"):
            export_bundle(mini, tmp_path / "out")
        with pytest.raises(OutputError, match="another process"), new_directory(tmp_path / "out"):
            pytest.fail("entered")
    assert (tmp_path / "out" / "a").read_text() == "x"


def test_an_output_that_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    with pytest.raises(OutputExistsError, match="appeared"), new_directory(tmp_path / "out"):
        (tmp_path / "out").mkdir()
    assert not list((tmp_path / "out").iterdir())


def test_a_file_that_cannot_grow_is_one_line(mini_path: Path, tmp_path: Path) -> None:
    """RLIMIT_FSIZE stands in for a full disk where a file system cannot be mounted."""

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))

    start = [sys.executable, "-m", "chameleon_deploy.export"]
    command = [*start, str(mini_path), "--out", str(tmp_path / "out"), "--no-verify"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, preexec_fn=limit)
    assert (result.returncode, result.stderr.count("\n")) == (2, 1), result.stderr
    assert "cannot write" in result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small tmpfs needs root; the test above covers the same path")
def test_a_full_disk_is_one_line(mini_path: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", disk], check=True)
    try:
        result = call("chameleon_deploy.export", mini_path, "--out", disk / "out", "--no-verify")
        assert (result.returncode, result.stderr.count("\n")) == (2, 1), result.stderr
        assert "No space left" in result.stderr
        assert not list(disk.iterdir())
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize("recipe", sorted((REPOSITORY / "export").glob("*.toml")), ids=lambda p: p.name)
def test_recipes_of_the_repository_are_valid(recipe: Path) -> None:
    assert (Path(read_recipe(recipe).checkpoint) / "chameleon_config.json").is_file()


def test_a_recipe_is_exported(mini_path: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "mini.toml"
    recipe.write_text(f'checkpoint = "{os.path.relpath(mini_path, tmp_path)}"\nprecision = "fp32"\n')
    result = call("chameleon_deploy.export", recipe, "--out", tmp_path / "b", "--no-verify")
    assert result.returncode == 0, result.stderr
    assert "not verified" in result.stdout
    open_bundle(tmp_path / "b")


@pytest.mark.parametrize(
    ("content", "message"),
    [('checkpoint = "x"\nsurprise = 1', "surprise"), ("checkpoint = ", "bad.toml"), ("", "checkpoint"),
     ('checkpoint = "x"\nprecision = "fp8"', "fp8"), ('checkpoint = "x"\n[limits]\nbeams = 2', "beams"),
     ('checkpoint = "x"\n[limits]\nbatch = "8"', "limits.batch"),
     (f'checkpoint = "x"\n[limits]\nbatch = {2**63}', "limits.batch")],
)  # fmt: skip
def test_bad_recipes(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "bad.toml").write_text(content)
    with pytest.raises(RecipeError, match=message):
        read_recipe(tmp_path / "bad.toml")


def test_limits_of_the_recipe_are_in_the_manifest(bundle: Path, mini: Checkpoint, tmp_path: Path) -> None:
    assert open_bundle(bundle).manifest.limits == LimitsSpec(batch=32, sequence=128, past=127, factor_sets=32)
    (tmp_path / "recipe.toml").write_text('checkpoint = "x"\n[limits]\nbatch = 2\npast = 16\n')
    manifest = export_bundle(mini, tmp_path / "b", limits=read_recipe(tmp_path / "recipe.toml").limits)
    assert manifest.limits == LimitsSpec(batch=2, sequence=128, past=16, factor_sets=4)  # all centroids at once
    assert open_bundle(tmp_path / "b").manifest == manifest


@pytest.mark.parametrize(
    ("limits", "message"),
    [(Limits(batch=0), "limits.batch must be at least 1"), (Limits(sequence=129), "limits.sequence 129 is beyond"),
     (Limits(past=128), "limits.past 128 is beyond"),
     (Limits(factor_sets=-1), "limits.factor_sets must be at least 1")],
)  # fmt: skip
def test_limits_are_checked_before_anything_is_written(
    limits: Limits, message: str, mini: Checkpoint, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=message):
        export_bundle(mini, tmp_path / "b", limits=limits)
    assert not list(tmp_path.iterdir())


def test_options_of_training_in_a_tokenizer_are_cleared(
    mini_path: Path, copy_of: Callable[[Path], Path], tmp_path: Path
) -> None:
    """Fine-tuning scripts save padding, truncation and dropout with the base; texts of a bundle are whole and alone."""
    path = copy_of(mini_path)
    file = path / "base" / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.enable_padding(pad_id=0)
    tokenizer.enable_truncation(8)
    model: Any = tokenizer.model
    model.dropout = 0.5
    tokenizer.save(str(file))
    short, long = "The river", "The river runs through a wide valley, past the mill and the old bridge."
    trunk, expected = load_trunk(path / "base"), load_trunk(mini_path / "base")
    alone = [expected.tokenizer.encode(text).ids for text in (short, long)]
    assert len(alone[1]) > 8
    assert [encoding.ids for encoding in trunk.tokenizer.encode_batch([short, long])] == alone
    export_bundle(load_checkpoint(path), tmp_path / "bundle")
    scores = chameleon_deploy.load(tmp_path / "bundle").score([short, long])
    assert [score.token_ids for score in scores] == alone


def test_the_tokenizer_is_that_of_the_directory(
    mini_path: Path, copy_of: Callable[[Path], Path], tmp_path: Path
) -> None:
    """transformers rebuilds the class GPT2Tokenizer with GPT-2's own pre-tokenizer, whatever the file has."""
    path = copy_of(mini_path)
    file = path / "base" / "tokenizer.json"
    content = json.loads(file.read_text())
    split = {"type": "Split", "pattern": {"Regex": LLAMA_3}, "behavior": "Isolated", "invert": False}
    steps = [split, content["pre_tokenizer"] | {"use_regex": False}]
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps}
    del content["model"]["ignore_merges"]  # as older releases wrote it
    content["model"]["merges"] = [" ".join(merge) for merge in content["model"]["merges"]]
    file.write_text(json.dumps(content))
    config = json.loads((path / "base" / "tokenizer_config.json").read_text())
    (path / "base" / "tokenizer_config.json").write_text(json.dumps(config | {"tokenizer_class": "GPT2Tokenizer"}))
    texts = ["def f(x):", "1234567", "don't\n\n  we", "river"]
    expected = [encoding.ids for encoding in Tokenizer.from_file(str(file)).encode_batch(texts)]
    checkpoint = load_checkpoint(path)
    export_bundle(checkpoint, tmp_path / "bundle")
    scores = chameleon_deploy.load(tmp_path / "bundle").score(texts)
    assert [score.token_ids for score in scores] == expected
    (check,) = check_tokenizers(checkpoint.trunk, texts)
    assert check.passed
    assert 1 <= check.value < len(texts)
    assert not list(check_tokenizers(load_trunk(mini_path / "base"), texts))


def test_a_tokenizer_that_no_runtime_loads_is_refused_first(
    mini_path: Path, copy_of: Callable[[Path], Path], tmp_path: Path
) -> None:
    path = copy_of(mini_path)
    file = path / "base" / "tokenizer.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | {"pre_tokenizer": {"type": "Whitespace"}}))
    out = tmp_path / "out" / "bundle"
    with pytest.raises(UnsupportedBaseError, match=r"tokenizer\.json.*Whitespace"):
        export_bundle(load_checkpoint(path), out)
    assert not out.parent.exists()
