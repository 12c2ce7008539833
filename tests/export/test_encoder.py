"""Sentence encoders in a bundle: PyTorch's embeddings, and descriptions of tasks as conditioning."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
import transformers
from tokenizers import Tokenizer

import chameleon_deploy
from chameleon_deploy import Adapt, Engine, Runtime
from chameleon_deploy.contract.onnx_operators import check_graph_file
from chameleon_deploy.errors import (
    ChameleonError,
    CheckpointError,
    InputError,
    LengthError,
    ManifestError,
    ModeError,
    UnsupportedBaseError,
)
from chameleon_deploy.export.encoder import build_encoder
from chameleon_deploy.export.exporter import export_bundle
from chameleon_deploy.export.weights import WeightsFile
from chameleon_deploy.reference.checkpoint import Checkpoint
from chameleon_deploy.reference.sentence_encoder import FAMILIES, SentenceEncoder, load_encoder
from chameleon_deploy.reference.source import add_encoder
from chameleon_deploy.reference.text_to_lora import TextToLoraFiles, load_text_to_lora
from chameleon_deploy.reference.tiny import save_base
from chameleon_deploy.verify.checkpoint_checks import check_encoder
from tests.commands import call
from tests.damage import edit
from tests.families import small_model
from tests.sentence_encoders import save_encoder, write
from tests.text_to_lora import ORDERS, SIZE, case_directory

TEXTS = ["Answer like a lawyer", "the court, finds", "x", "Writing code: a, unknown words! " * 2]
ROWS = [[5, 6, 7, 8], [9, 10, 11], [30, 4, 5]]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("pooling", "normalize"), [("cls", False), ("mean", True)])
def test_embeddings_are_those_of_pytorch(family: str, pooling: str, normalize: bool, tmp_path: Path) -> None:
    compare(load_encoder(save_encoder(tmp_path / "encoder", family, pooling, normalize)), tmp_path)


@pytest.mark.skipif("CHAMELEON_ENCODER" not in os.environ, reason="CHAMELEON_ENCODER=DIR names a real encoder")
def test_a_real_encoder(tmp_path: Path) -> None:
    path = Path(os.environ["CHAMELEON_ENCODER"])
    encoder, theirs = load_encoder(path), transformers.AutoTokenizer.from_pretrained(path)
    for text in TEXTS:
        assert encoder.tokenizer.encode(text).ids == theirs(text)["input_ids"]
    compare(encoder, tmp_path)


def compare(encoder: SentenceEncoder, tmp_path: Path) -> None:
    with WeightsFile(tmp_path / "weights.bin") as weights:
        ir.save(build_encoder(encoder, weights), tmp_path / "encoder.onnx")
    check_graph_file(tmp_path / "encoder.onnx", {"weights.bin": (tmp_path / "weights.bin").stat().st_size})
    session = onnxruntime.InferenceSession(tmp_path / "encoder.onnx", providers=["CPUExecutionProvider"])
    for text in TEXTS:
        ids = encoder.tokenizer.encode(text, add_special_tokens=False).ids
        whole = [*encoder.prefix, *ids, *encoder.suffix]
        (found,) = session.run(["embeddings"], {"input_ids": np.array([whole] * 2)})
        np.testing.assert_allclose(found, np.stack([encoder.embed(text).numpy()] * 2), atol=1e-5)
        print(f"{text!r:.30}: largest difference {np.abs(found[0] - encoder.embed(text).numpy()).max():.2g}")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_encoder(tmp_path_factory.mktemp("encoder") / "encoder")


@pytest.fixture(scope="module")
def checkpoint(llama_path: Path, directory: Path) -> Checkpoint:
    base = directory.parent / "base"
    save_base(small_model("llama"), Tokenizer.from_file(str(llama_path / "base" / "tokenizer.json")), base)
    found = load_text_to_lora(str(base), TextToLoraFiles(case_directory("trained"), ORDERS["trained"]))
    add_encoder(found, directory)
    return found


@pytest.fixture(scope="module")
def path(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("encoder") / "bundle"
    export_bundle(checkpoint, path)
    return path


@pytest.fixture(scope="module")
def runtime(path: Path) -> Runtime:
    return chameleon_deploy.load(path, threads=1)


def vectors(checkpoint: Checkpoint, *descriptions: str) -> Any:
    """What the authors' program conditions on: the embedding of length sqrt(size)."""
    assert checkpoint.encoder is not None
    found = torch.stack([checkpoint.encoder.embed(text) for text in descriptions])
    return (torch.nn.functional.normalize(found) * SIZE**0.5).numpy()


def factors(runtime: Runtime, **how: Any) -> dict[str, Any]:
    row_factors = runtime.adapt(ROWS, **how).factors
    return {name: np.asarray(stack)[row_factors.factor_ids] for name, stack in row_factors.sets.tensors.items()}


def test_a_description_becomes_an_update(runtime: Runtime, checkpoint: Checkpoint) -> None:
    lawyer, coder = vectors(checkpoint, "answer like a lawyer.", "write code, x!")
    told = factors(runtime, adapt_text=" answer like a lawyer ")
    for name, stack in factors(runtime, conditioning=[lawyer] * 3).items():
        np.testing.assert_allclose(told[name], stack, atol=1e-5)
    each = factors(runtime, adapt_text=["write code, x!", "answer like a lawyer", "write code, x!"])
    for name, stack in factors(runtime, conditioning=[coder, lawyer, coder]).items():
        np.testing.assert_allclose(each[name], stack, atol=1e-5)
        assert not np.allclose(each[name][0], told[name][0], atol=1e-3)


def test_the_engine_takes_descriptions(runtime: Runtime) -> None:
    how: dict[str, Any] = {"adapt_text": ["answer", "code", "answer"], "max_new_tokens": 3}
    expected = runtime.generate(ROWS, **how)
    with Engine(runtime) as engine:
        assert [row.token_ids for row in engine.submit(ROWS, **how).result()] == [row.token_ids for row in expected]


def test_the_commands_take_descriptions(runtime: Runtime, tmp_path: Path) -> None:
    prompts, told = ["The river", "The court"], ["answer", "code"]
    options = [word for text in told for word in ("--adapt-text", text)]
    words = ["--prompt", prompts[0], "--prompt", prompts[1], "--max-new-tokens", 3, "--json"]
    result = call("chameleon_deploy.generate", runtime.bundle.path, *words, *options)
    assert result.returncode == 0, result.stderr
    found = [json.loads(line)["token_ids"] for line in result.stdout.splitlines()]
    assert found == [each.token_ids for each in runtime.generate(prompts, adapt_text=told, max_new_tokens=3)]
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in prompts))
    words = ["--text", file, "--batch-size", 1, "--json"]
    result = call("chameleon_deploy.score", runtime.bundle.path, *words, *options)
    assert result.returncode == 0, result.stderr
    logprobs = [json.loads(line)["token_logprobs"] for line in result.stdout.splitlines()]
    for ours, score in zip(logprobs, runtime.score(prompts, adapt_text=told), strict=True):
        np.testing.assert_allclose(ours, score.token_logprobs, atol=1e-5)
    file.write_text(json.dumps({"text": "x"}))
    for command in (["generate", runtime.bundle.path, "--prompt", "x"], ["score", runtime.bundle.path, "--text", file]):
        result = call(f"chameleon_deploy.{command[0]}", *command[1:], *options)
        assert (result.returncode, "--adapt-text is given 2 times for 1 texts" in result.stderr) == (2, True)


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        ({"adapt_text": "answer", "mode": "none"}, ModeError, "descriptions go with mode 'request'"),
        ({"adapt_text": ["answer"]}, InputError, "1 values of adapt_text for 3 prompts"),
        ({"adapt_text": ["answer", 3, "code"]}, InputError, "adapt_text is a description"),
        ({"adapt_text": ""}, InputError, "is empty"),
        ({"adapt_text": "a " * 40}, LengthError, "41 tokens, the model has 30 positions"),
        ({"adapt_text": "\ud800"}, InputError, "not valid Unicode"),
        ({"adapt_text": "a", "conditioning": [[0.0] * SIZE] * 3}, InputError, "pass one"),
    ],
    ids=str,
)
def test_what_describes_nothing_is_refused(
    how: dict[str, Any], error: type[ChameleonError], message: str, runtime: Runtime
) -> None:
    with pytest.raises(error, match=message) as caught:
        runtime.adapt(ROWS, **how)
    assert caught.value.argument == "adapt_text"


def test_a_bundle_without_an_encoder(lora_runtime: Runtime) -> None:
    with pytest.raises(ModeError, match="needs a bundle that was exported with --encoder"):
        lora_runtime.score(ROWS, Adapt(adapt_text="a"))


def test_the_gate_sees_another_encoder(runtime: Runtime, checkpoint: Checkpoint, tmp_path: Path) -> None:
    assert all(check.passed for check in check_encoder(runtime, checkpoint))
    right = checkpoint.encoder
    try:
        checkpoint.encoder = load_encoder(save_encoder(tmp_path / "mean", pooling="mean"))
        assert not all(check.passed for check in check_encoder(runtime, checkpoint))
        checkpoint.encoder = None
        assert [check.name for check in check_encoder(runtime, checkpoint)] == ["left out: encoder"]
    finally:
        checkpoint.encoder = right


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda path: (path / "modules.json").unlink(), CheckpointError, "no modules.json"),
        (lambda path: write(path / "modules.json", [1]), CheckpointError, "not a list of modules"),
        (lambda path: write(path / "modules.json", [{"type": "x.Transformer", "path": ""},
                                                    {"type": "x.Pooling", "path": "../elsewhere"}]),
         CheckpointError, "not in this directory"),
        (lambda path: write(path / "modules.json", [{"type": f"x.{k}", "path": ""} for k in ("Transformer", "Dense")]),
         UnsupportedBaseError, "Transformer, Dense: deployed are"),
        (lambda path: write(path / "1_Pooling" / "config.json", {"pooling_mode_max_tokens": True}),
         UnsupportedBaseError, "pooling by pooling_mode_max_tokens"),
        (lambda path: write(path / "sentence_bert_config.json", {"do_lower_case": True}), UnsupportedBaseError,
         "do_lower_case"),
        (lambda path: write(path / "config.json", {"model_type": "gpt2"}), UnsupportedBaseError, "model_type 'gpt2'"),
        (lambda path: (path / "model.safetensors").unlink(), CheckpointError, "cannot load an encoder"),
    ],
)  # fmt: skip
def test_what_is_no_encoder_is_refused(
    change: Callable[[Path], object], error: type[ChameleonError], message: str, tmp_path: Path
) -> None:
    change(save_encoder(tmp_path / "encoder"))
    with pytest.raises(error, match=message):
        load_encoder(tmp_path / "encoder")


def test_the_encoder_of_the_training_is_asked_for(checkpoint: Checkpoint, mini: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="trained with the first token"):
        add_encoder(checkpoint, save_encoder(tmp_path / "mean", pooling="mean"))
    with pytest.raises(InputError, match="is of a hypernetwork that reads vectors"):
        add_encoder(mini, tmp_path / "mean")


@pytest.mark.parametrize(
    "changes",
    [{"encoder__size": 5}, {"encoder__prefix_ids": [99]}, {"encoder__max_tokens": 2}, {"encoder__vocab_size": 0},
     {"encoder__conditioning_norm": -1.0}, {"encoder": None}],
    ids=str,
)  # fmt: skip
def test_a_manifest_that_contradicts_itself(changes: dict[str, Any], path: Path, copy_of: Any) -> None:
    damaged = copy_of(path)
    edit(**changes)(damaged)
    with pytest.raises(ManifestError, match="encoder"):
        chameleon_deploy.load(damaged, threads=1)


def test_the_manifest_of_a_bundle_without_one_is_as_before(lora_bundle: Path) -> None:
    assert "encoder" not in json.loads((lora_bundle / "bundle.json").read_text())
