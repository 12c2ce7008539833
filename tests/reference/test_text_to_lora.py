"""Released text-to-LoRA networks: what the authors' program generates, and what is refused."""

from __future__ import annotations

import json
import pickle
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
import yaml
from safetensors.numpy import load_file
from tokenizers import Tokenizer

import chameleon_deploy
from chameleon_deploy.errors import ChameleonError, CheckpointError, InputError, TensorError
from chameleon_deploy.export.exporter import export_bundle
from chameleon_deploy.export.hypernetwork import build_hypernetwork
from chameleon_deploy.export.weights import WeightsFile
from chameleon_deploy.reference.checkpoint import Checkpoint
from chameleon_deploy.reference.source import load_source
from chameleon_deploy.reference.text_to_lora import TextToLora, TextToLoraFiles, load_text_to_lora, order_losses
from chameleon_deploy.reference.tiny import save_base
from tests.commands import call
from tests.families import small_model
from tests.text_to_lora import CASES, ORDERS, SIZE, VECTORS, case_directory, example_ids
from tests.verification import missed

PREFIX = "base_model.model."
ORDER = ",".join(ORDERS["trained"])


@pytest.fixture(scope="module")
def base(llama_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text_to_lora") / "base"
    save_base(small_model("llama"), Tokenizer.from_file(str(llama_path / "base" / "tokenizer.json")), path)
    return path


def loaded(base: Path, case: str, order: tuple[str, ...] | None = None) -> Checkpoint:
    return load_text_to_lora(str(base), TextToLoraFiles(case_directory(case), order or ORDERS[case]))


def golden(case: str) -> dict[str, list[Any]]:
    """The published program's factors by name, of each vector."""
    found: dict[str, list[Any]] = {}
    for key, tensor in sorted(load_file(case_directory(case) / "golden.safetensors").items()):
        found.setdefault(key.partition(".")[2].removeprefix(PREFIX).removesuffix(".weight"), []).append(tensor)
    return found


@pytest.mark.parametrize("case", CASES)
def test_factors_are_those_of_the_published_program(case: str, base: Path, tmp_path: Path) -> None:
    checkpoint, expected = loaded(base, case), golden(case)
    ours = checkpoint.factors(torch.from_numpy(VECTORS))
    assert ours.keys() == expected.keys()
    assert isinstance(checkpoint.factors, TextToLora)
    with WeightsFile(tmp_path / "weights.bin") as weights:
        graph = build_hypernetwork(checkpoint.factors, SIZE, checkpoint.config.alpha, weights)
        ir.save(graph, tmp_path / "hypernetwork.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "hypernetwork.onnx", providers=["CPUExecutionProvider"])
    names = [node.name for node in session.get_outputs()]
    in_graph = dict(zip(names, session.run(names, {"conditioning": VECTORS}), strict=True))
    for name, stack in expected.items():
        np.testing.assert_allclose(ours[name], np.stack(stack), atol=1e-5)
        scaled = np.stack(stack).swapaxes(1, 2) * checkpoint.config.alpha if name.endswith("B") else np.stack(stack)
        np.testing.assert_allclose(in_graph[name], scaled, atol=1e-5)


def test_the_wrong_order_is_another_update(base: Path) -> None:
    right, wrong = (loaded(base, "trained", order).factors(torch.from_numpy(VECTORS))
                    for order in (ORDERS["trained"], ORDERS["trained"][::-1]))  # fmt: skip
    assert all(not torch.allclose(right[name], wrong[name], atol=1e-3) for name in right)


def test_every_gate(base: Path, tmp_path: Path) -> None:
    checkpoint = loaded(base, "trained")
    export_bundle(checkpoint, tmp_path / "bundle")
    assert not missed(tmp_path / "bundle", checkpoint)
    assert "factors, relative difference" in missed(tmp_path / "bundle", loaded(base, "trained", ("q_proj", "v_proj")))
    runtime = chameleon_deploy.load(tmp_path / "bundle", threads=1)
    first, second = runtime.generate([[5, 6, 7]] * 2, conditioning=VECTORS[:2] * 10, max_new_tokens=4)
    assert runtime.manifest.adaptation.conditioning_size == SIZE
    assert len(first.token_ids) == len(second.token_ids) == 4


def with_number_texts(checkpoint: Checkpoint) -> Any:
    """The trunk with a tokenizer whose texts are lists of ids."""
    tokenizer = SimpleNamespace(encode=lambda text, **_: SimpleNamespace(ids=json.loads(text)))
    return replace(checkpoint.trunk, tokenizer=tokenizer)


def test_the_right_order_has_the_smaller_loss(base: Path) -> None:
    checkpoint = loaded(base, "trained")
    assert isinstance(checkpoint.factors, TextToLora)
    texts = [json.dumps(example_ids(task)) for task in range(2)]
    arguments = with_number_texts(checkpoint), checkpoint.factors, checkpoint.config.alpha, texts
    losses = order_losses(*arguments, VECTORS[:2])
    assert min(losses, key=lambda order: losses[order]) == ORDERS["trained"]
    assert checkpoint.factors.types == ORDERS["trained"]
    with pytest.raises(InputError, match="vectors of 5 numbers, not 6"):
        order_losses(*arguments, VECTORS[:2, :5])


def examples(path: Path) -> tuple[Path]:
    lines = [{"text": "def f(x): return", "conditioning": vector.tolist()} for vector in VECTORS]
    path.write_text("\n".join(map(json.dumps, lines)))
    return (path,)


def test_an_order_that_the_examples_contradict_is_refused(base: Path, tmp_path: Path) -> None:
    """Of the two orders exactly one is refused: that of the larger loss."""
    files = TextToLoraFiles(case_directory("trained"), examples=examples(tmp_path / "examples.jsonl"))
    refusals = []
    for order in (ORDERS["trained"], ORDERS["trained"][::-1]):
        try:
            load_text_to_lora(str(base), replace(files, order=order))
        except InputError as error:
            refusals.append(str(error))
    assert len(refusals) == 1
    assert "q_proj,v_proj has the loss" in refusals[0]
    with pytest.raises(InputError, match=r"on the examples q_proj,v_proj has the loss \d"):
        load_text_to_lora(str(base), files)


def test_nobody_guesses_the_order(base: Path) -> None:
    files = TextToLoraFiles(case_directory("trained"))
    with pytest.raises(InputError, match="pass --target-order, such as v_proj,q_proj, in which"):
        load_text_to_lora(str(base), files)
    with pytest.raises(InputError, match="name each of q_proj, v_proj once"):
        load_text_to_lora(str(base), replace(files, order=("q_proj", "q_proj")))
    assert loaded(base, "recon").config.targets  # a single type has one order


@pytest.fixture
def network(tmp_path: Path) -> Path:
    return Path(shutil.copytree(case_directory("trained"), tmp_path / "network"))


def options(**values: Any) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        content = yaml.safe_load((path / "args.yaml").read_text())
        (path / "args.yaml").write_text(yaml.dump({**content, **values}))

    return change


def tensors(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def rewrite(path: Path) -> None:
        state = torch.load(path / "hypermod.pt", weights_only=True)
        change(state)
        torch.save(state, path / "hypermod.pt")

    return rewrite


def pickled(path: Path) -> None:
    class Code:
        def __reduce__(self) -> Any:
            return (print, ("executed",))

    with zipfile.ZipFile(path / "hypermod.pt", "w") as archive:
        archive.writestr("hypermod/data.pkl", pickle.dumps({"weight": Code()}))
        archive.writestr("hypermod/version", "3\n")


def compressed(path: Path) -> None:
    with zipfile.ZipFile(path / "hypermod.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("hypermod/data.pkl", b"0" * 1000)


def write(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda path: (path / name).write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (options(encoder_type="vq"), CheckpointError, "encoder_type=vq: this release does not deploy it"),
        (options(autoreg_gen=True), CheckpointError, "autoreg_gen=True"),
        (options(exp_setup="hyper_vera"), CheckpointError, "exp_setup=hyper_vera"),
        (options(training_task="recon", factorized=True), CheckpointError, "factorized with training_task=recon"),
        (options(hypernet_latent_size=2**40), CheckpointError, "hypernet_latent_size"),
        (options(hypernet_latent_size="x"), CheckpointError, "Expected `int`, got `str`"),
        (options(mt_lora_path="elsewhere"), TensorError, r"unexpected tensor heads\..*bias"),
        (options(head_in_size=8), TensorError, "needs? "),
        (write("args.yaml", b"!!python/object/apply:print [executed]"), CheckpointError, "could not determine"),
        (write("args.yaml", b"- 1"), CheckpointError, "not a mapping"),
        (write("args.yaml", b"[" * 5000), CheckpointError, "args.yaml"),
        (write("args.yaml", b"#" * (2**22 + 1)), CheckpointError, "bytes are no options"),
        (write("hypermod.pt", b"PK"), CheckpointError, "not a file that torch.save wrote"),
        (write("adapter_config.json", b'{"r": 2, "lora_alpha": 4, "target_modules": "all-linear"}'), CheckpointError,
         "is no list of distinct module names"),
        (lambda path: (path / "hypermod.pt").unlink(), CheckpointError, "not a file that torch.save wrote"),
        (pickled, CheckpointError, "not a state dict that loads with weights_only=True"),
        (compressed, CheckpointError, "a compressed archive"),
        (tensors(lambda state: state.pop("mlp1.mlp.1.bias")), TensorError, r"tensor mlp1.mlp.1.bias is missing"),
        (tensors(lambda state: state.update(more=torch.zeros(1))), TensorError, "unexpected tensor more"),
        (tensors(lambda state: state["mlp3.1.bias"].fill_(torch.nan)), TensorError, "mlp3.1.bias holds NaN"),
        (tensors(lambda state: state.update({"mixer.1.bias": torch.zeros(1).expand(2**40)})), TensorError,
         "mixer.1.bias has shape"),
        (tensors(lambda state: state.update({"mixer.1.bias": torch.zeros(64, dtype=torch.int32)})), TensorError,
         "mixer.1.bias has dtype"),
    ],
)  # fmt: skip
def test_what_cannot_be_deployed_is_refused(
    damage: Callable[[Path], object], error: type[ChameleonError], message: str, base: Path, network: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    damage(network)
    with pytest.raises(error, match=message):
        load_text_to_lora(str(base), TextToLoraFiles(network, ORDERS["trained"]))
    assert "executed" not in capfd.readouterr().out


def test_the_network_is_of_a_base_model_alone(base: Path) -> None:
    files = TextToLoraFiles(case_directory("trained"), ORDERS["trained"])
    with pytest.raises(InputError, match="leave out --adapter"):
        load_source(base, None, {}, ["attention"], network=files)
    with pytest.raises(InputError, match="is of a base model"):
        load_source(case_directory("trained"), None, {}, network=files)


def test_the_command_needs_an_order(base: Path, tmp_path: Path) -> None:
    directory = case_directory("trained")
    for extra, expected in (
        (["--hypernetwork", directory], "pass --target-order"),
        (["--target-order", ORDER], "pass --hypernetwork DIR"),
    ):
        ended = call("chameleon_deploy.export", base, *extra, "--out", tmp_path / "bundle")
        assert ended.returncode == 2
        assert expected in ended.stderr.replace("\n", " ")
