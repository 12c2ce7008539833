"""What `verify` compares as data: each fault that a few texts do not show is planted in a bundle and caught."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from safetensors.numpy import load_file, save_file

import chameleon_deploy
from chameleon_deploy import Runtime
from chameleon_deploy.contract.bundle import Precision, open_bundle
from chameleon_deploy.reference import inference
from chameleon_deploy.reference.checkpoint import Checkpoint
from chameleon_deploy.reference.inference import RowLogits
from chameleon_deploy.runtime.known_answers import recorded_answers
from chameleon_deploy.verify import checkpoint_checks
from chameleon_deploy.verify.data_checks import check_data
from chameleon_deploy.verify.gates import GATES
from tests.conftest import Exported
from tests.damage import Damage, change_weights, edit, reseal

Copy = Callable[[Path], Path]


def missed(path: Path, checkpoint: Checkpoint) -> set[str]:
    bundle = open_bundle(path)
    checks = list(check_data(bundle, checkpoint, GATES[bundle.manifest.precision]))
    assert len({check.name for check in checks}) == len(checks)
    return {check.name for check in checks if not check.passed}


def tokenizer(change: Callable[[Any], object]) -> Damage:
    """Change tokenizer.json."""

    def damage(path: Path) -> None:
        content = json.loads((path / "tokenizer.json").read_text())
        change(content)
        (path / "tokenizer.json").write_text(json.dumps(content))
        reseal(path)

    return damage


def swap(entries: list[Any], first: int, second: int) -> None:
    entries[first], entries[second] = entries[second], entries[first]


def swap_tokens(content: Any) -> None:
    vocab = content["model"]["vocab"]
    first, second = list(vocab)[-2:]
    vocab[first], vocab[second] = vocab[second], vocab[first]


def move_centroids(path: Path) -> None:
    centroids = load_file(path / "centroids.safetensors")["centroids"]
    centroids[0, 0] += np.float32(1e-6)
    save_file({"centroids": centroids}, path / "centroids.safetensors")
    reseal(path)


def choose_the_last(path: Path) -> None:
    model = onnx.load(path / "chooser.onnx")
    (node,) = [node for node in model.graph.node if node.op_type == "ArgMax"]
    node.attribute.append(onnx.helper.make_attribute("select_last_index", 1))
    onnx.save(model, path / "chooser.onnx")
    reseal(path)


def accept_nan(path: Path) -> None:
    """The chooser does not report logits that are not finite."""
    model = onnx.load(path / "chooser.onnx")
    (node,) = [node for node in model.graph.node if node.op_type == "Where"]
    node.input[1] = node.input[2]
    onnx.save(model, path / "chooser.onnx")
    reseal(path)


def score_another_axis(path: Path) -> None:
    model = onnx.load(path / "logits_scorer.onnx")
    (node,) = [node for node in model.graph.node if node.op_type == "LogSoftmax"]
    node.attribute[0].i = 1
    onnx.save(model, path / "logits_scorer.onnx")
    reseal(path)


FAULTS: dict[str, tuple[Damage, str]] = {
    "end of text": (edit(model__eos_token_id=1), "manifest: fields of the model that differ"),
    "alpha": (edit(adaptation__alpha=2.0), "manifest: fields of the adaptation that differ"),
    "longest text": (edit(adaptation__max_length=9), "manifest: fields of the adaptation that differ"),
    "checkpoint": (edit(checkpoint_digest="0" * 64), "manifest: digest of the checkpoint differs"),
    "parameters of the base": (edit(parameters__base=1), "manifest: counts of parameters that differ"),
    "parameters of a factor set": (edit(parameters__factors=1), "manifest: counts of parameters that differ"),
    "parameters of the hypernetwork": (edit(parameters__hypernetwork=1), "manifest: counts of parameters that differ"),
    "two tokens": (tokenizer(swap_tokens), "tokenizer: entries of the vocabulary that differ"),
    "last merge removed": (tokenizer(lambda t: t["model"]["merges"].pop()), "tokenizer: merges that differ"),
    "middle merge removed": (tokenizer(lambda t: t["model"]["merges"].pop(90)), "tokenizer: merges that differ"),
    "merges swapped": (tokenizer(lambda t: swap(t["model"]["merges"], 90, 120)), "tokenizer: merges that differ"),
    "no special token": (
        tokenizer(lambda t: t["added_tokens"][0].update(special=False)), "tokenizer: added tokens that differ"
    ),
    "prefix space": (
        tokenizer(lambda t: t["pre_tokenizer"].update(add_prefix_space=True)), "tokenizer: other settings differ"
    ),
    "a centroid + 1e-6": (move_centroids, "centroids, max abs difference"),
    "the last of equal logits": (choose_the_last, "chooser: tokens that differ"),
    "logits that are not finite": (accept_nan, "chooser: tokens that differ"),
    "scores along another axis": (score_another_axis, "logits_scorer: log-probabilities, max abs difference"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_that_few_texts_show_is_caught(fault: str, bundle: Path, mini: Checkpoint, copy_of: Copy) -> None:
    damage, name = FAULTS[fault]
    path = copy_of(bundle)
    assert missed(path, mini) == set()
    damage(path)
    assert missed(path, mini) == {name}


def _row_of(matrix: str, row: int, factor: float) -> Damage:
    """Multiply a row, or its scale, of an initializer of decoder.onnx."""

    def damage(path: Path) -> None:
        initializers = onnx.load(path / "decoder.onnx", load_external_data=False).graph.initializer
        (tensor,) = [tensor for tensor in initializers if tensor.name == matrix]
        place = {entry.key: entry.value for entry in tensor.external_data}
        dtype = np.uint16 if matrix.endswith("bf16") else onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
        values = np.memmap(path / "weights.bin", dtype, "r+", int(place["offset"]), tuple(tensor.dims))
        if dtype == np.uint16:
            values[row] ^= 0x8000  # the sign
        else:
            values[row] = values[row] * factor
        values.flush()
        reseal(path)

    return damage


ROWS: dict[str, tuple[str, Precision, str, float]] = {
    "a negated row of an int8 head": ("llama", "int8", "lm_head.weight.int8", -1),
    "a row of zeros of a tied int8 head": ("mini", "int8", "lm_head.weight.int8", 0),
    "a row's scale of an int8 head, 5 % larger": ("llama", "int8", "lm_head.weight.scale", 1.05),
    "a row of an int8 embedding": ("llama", "int8", "model.embed_tokens.weight.int8", 0),
    "a negated row of a bfloat16 head": ("llama", "bf16", "lm_head.weight.bf16", -1),
    "a row of an embedding, an ulp larger": ("llama", "fp32", "model.embed_tokens.weight", 1.0000001),
    "a row of a head, an ulp larger": ("llama", "fp32", "lm_head.weight", 1.0000001),
}


@pytest.mark.parametrize("fault", ROWS)
def test_a_wrong_row_is_caught(fault: str, exported: Exported, copy_of: Copy, request: pytest.FixtureRequest) -> None:
    """Whatever token it is of: texts may not have it."""
    family, precision, matrix, factor = ROWS[fault]
    right, checkpoint = exported(family, precision), request.getfixturevalue(family)
    assert missed(right, checkpoint) == set()
    path = copy_of(right)
    _row_of(matrix, 511, factor)(path)
    names = {name.removesuffix(": rows, largest relative difference") for name in missed(path, checkpoint)}
    heads = {"head of decoder", "head of decoder_cpu"} if matrix.startswith("lm_head") else set()
    assert names == heads | ({"token embedding"} if "embed" in matrix or family == "mini" else set())


@pytest.mark.parametrize(("shift", "caught"), [(1e-3, True), (2e-5, False)])
def test_a_hypernetwork_that_is_a_little_off_is_tolerated(
    shift: float, caught: bool, bundle: Path, mini: Checkpoint, copy_of: Copy
) -> None:
    """Below the limit of factors, which is not a comparison of weights, no log-probability changes by 5e-5."""

    def first(biases: Any) -> Any:
        biases[0] += np.float32(shift)
        return biases

    path = copy_of(bundle)
    change_weights("lm_head.lora_A.bias", first)(path)
    right, wrong = (chameleon_deploy.load(each, threads=1) for each in (bundle, path))
    rows = recorded_answers(right.bundle).rows
    checks = list(checkpoint_checks.check_adaptation(wrong, mini, rows, GATES["fp32"]))
    assert {check.name for check in checks if not check.passed} == (
        {"factors, relative difference"} if caught else set()
    )
    pairs = zip(right.score(rows), wrong.score(rows), strict=True)
    difference = max(np.abs(np.subtract(a.token_logprobs, b.token_logprobs)).max() for a, b in pairs)
    assert difference > 2e-4 if caught else 0 < difference < 5e-5


def test_greedy_tokens_are_the_references(runtime: Runtime, mini: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    def differ() -> list[float]:
        answers = recorded_answers(runtime.bundle)
        theirs = inference.adapt(mini, answers.rows, "cohort")
        return [checkpoint_checks.check_greedy("cohort", answers, reference, theirs, GATES["fp32"]).value]

    reference: Any = RowLogits(mini)
    assert differ() == [0]
    right = RowLogits(mini)
    reference = lambda *given: -right(*given)  # noqa: E731
    assert differ()[0] > 20
    reference = lambda *given: torch.zeros_like(right(*given))  # noqa: E731  (no gap is clear)
    assert differ() == [0]
