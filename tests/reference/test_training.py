"""Training: repeatable, resumable, bounded, per cluster."""

from __future__ import annotations

import copy
import json
import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from chameleon_deploy.bench.quality import text_windows
from chameleon_deploy.contract.bundle import TargetSpec
from chameleon_deploy.errors import InputError, OutputExistsError
from chameleon_deploy.evaluate.scoring import cohort_rows, evaluate
from chameleon_deploy.export.int8.calibration import calibration_texts
from chameleon_deploy.reference import corpus, fit, head_losses, inference
from chameleon_deploy.reference.checkpoint import Checkpoint, CheckpointConfig, load_checkpoint
from chameleon_deploy.reference.hidden_states import HiddenStates, cache_hidden_states
from chameleon_deploy.reference.hypernetwork import Hypernetwork
from chameleon_deploy.reference.presets import PAPER, PRESETS, PresetName, TrainingSettings
from chameleon_deploy.reference.python_corpus import KINDS, python_texts
from chameleon_deploy.reference.targets import choose_targets
from chameleon_deploy.reference.training import TrainingInputs, train_checkpoint
from chameleon_deploy.terminal.texts import read_conditioned
from tests.bigram import bigram_perplexity
from tests.commands import call
from tests.conftest import REPOSITORY, nearly

TEXTS = [text for kind in KINDS for text in python_texts(kind, 24)]
TRAIN, HELD_OUT = corpus.split_texts(TEXTS, 0.2)
TASKS = (("a", 1), ("b", -1))


def quiet(what: str, done: int, total: int) -> None:
    pass


def config(**changes: object) -> CheckpointConfig:
    defaults = {"regime": "chameleon", "base_model": "./base", "rank": 4, "hidden_sizes": (16, 8), "num_clusters": 3,
                "max_length": 48}  # fmt: skip
    return CheckpointConfig(**(defaults | changes))  # type: ignore[arg-type]


def settings_of(**changes: float) -> TrainingSettings:
    return PAPER.with_options(**changes).training


def parameters(path: Path, base: Path) -> dict[str, torch.Tensor]:
    return dict(load_checkpoint(path, base=str(base)).factors.state_dict())


@pytest.mark.parametrize("regime", ["chameleon", "lora"])
@pytest.mark.parametrize("protocol", ["masked", "paper"])
def test_training_lowers_the_held_out_loss(
    mini: Checkpoint, mini_path: Path, tmp_path: Path, regime: str, protocol: str
) -> None:
    changes = {"regime": regime, "protocol": protocol, "hidden_sizes": (16, 8) if regime == "chameleon" else ()}
    settings = settings_of(epochs=4 if protocol == "masked" else 30, lr=3e-3)  # paper: one position per text
    train_checkpoint(mini.trunk, config(**changes), TrainingInputs(TRAIN, HELD_OUT), tmp_path / "out", settings, quiet)
    checkpoint = load_checkpoint(tmp_path / "out", base=str(mini_path / "base"))
    base = evaluate(checkpoint, HELD_OUT, tmp_path / "cache", adapted=False)
    trained = evaluate(checkpoint, HELD_OUT, tmp_path / "cache")
    assert (base.regime, trained.regime, trained.protocol) == ("base", regime, protocol)
    assert trained.loss < base.loss - 0.1
    assert not (tmp_path / "out.training").exists()


def test_the_seed_decides_everything(mini: Checkpoint, mini_path: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train_checkpoint(
            mini.trunk,
            config(),
            TrainingInputs(TRAIN, HELD_OUT),
            tmp_path / name,
            settings_of(epochs=2, seed=seed),
            quiet,
        )
    a, b, c = (parameters(tmp_path / name, mini_path / "base") for name in "abc")
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert not all(torch.equal(a[key], c[key]) for key in a)


def test_a_killed_training_resumes_to_the_same_end(mini: Checkpoint, mini_path: Path, tmp_path: Path) -> None:
    text, texts = tmp_path / "train.jsonl", TEXTS[::2]
    text.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    state = tmp_path / "killed.training" / "state.safetensors"
    process = os.fork()  # not a new process, which would import PyTorch first
    if process == 0:
        try:
            call("chameleon_deploy.train", "--base", mini_path / "base", "--text", text, "--out", tmp_path / "killed",
                 "--epochs", 10_000, "--patience", 10_000, "--clusters", 3, "--max-length", 48,
                 "--seed", 5)  # fmt: skip
        finally:
            os._exit(0)
    deadline = time.monotonic() + 120
    while not state.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process, signal.SIGKILL)
    assert os.WIFSIGNALED(os.waitpid(process, 0)[1])
    assert not (tmp_path / "killed").exists()
    epoch = json.loads(load_file(state)["json"].tobytes())["epoch"]

    train, held_out = corpus.split_texts(texts, 0.1)
    inputs, fewer = TrainingInputs(train, held_out), TrainingInputs(train[1:], held_out)
    settings = settings_of(epochs=8, patience=200, seed=5)
    changes = config(hidden_sizes=(64, 32), base_model=os.path.relpath(mini_path / "base", tmp_path / "killed"))
    with pytest.raises(InputError, match="other texts or settings"):
        train_checkpoint(mini.trunk, changes, fewer, tmp_path / "killed", settings, quiet, resume=True)
    with pytest.raises(OutputExistsError, match="--resume"):
        train_checkpoint(mini.trunk, changes, inputs, tmp_path / "killed", settings, quiet)
    settings = settings_of(epochs=epoch + 2, patience=200, seed=5)
    epochs: list[int] = []
    resumed = train_checkpoint(
        mini.trunk, changes, inputs, tmp_path / "killed", settings,
        lambda what, done, total: epochs.append(done) if what.startswith("epochs") else None, resume=True,
    )  # fmt: skip
    assert epochs == [epoch + 1, epoch + 2]
    straight = train_checkpoint(mini.trunk, changes, inputs, tmp_path / "straight", settings, quiet)
    assert resumed.history == nearly(straight.history)
    a, b = (parameters(tmp_path / name, mini_path / "base") for name in ("killed", "straight"))
    assert all(torch.allclose(a[key], b[key], rtol=1e-3, atol=1e-5) for key in a)


@pytest.mark.parametrize("architecture", ["paper", "shared"])
def test_layers_of_the_trunk_are_trained_and_resumed(
    mini: Checkpoint, mini_path: Path, tmp_path: Path, architecture: str
) -> None:
    targets = choose_targets(mini.trunk, ["mlp", "lm_head"])
    about = config(targets=targets, architecture=architecture)
    straight, texts = settings_of(epochs=3, lr=1e-2, patience=9), (TRAIN[:40], HELD_OUT)
    state = train_checkpoint(mini.trunk, about, TrainingInputs(*texts), tmp_path / "straight", straight, quiet)
    base = evaluate(load_checkpoint(tmp_path / "straight", base=str(mini_path / "base")), HELD_OUT, tmp_path, False)
    assert state.best_loss < base.loss - 0.05

    class KilledError(Exception):
        pass

    def kill(what: str, done: int, total: int) -> None:
        if what.startswith("epochs") and done == 2:
            raise KilledError

    with pytest.raises(KilledError):
        train_checkpoint(mini.trunk, about, TrainingInputs(*texts), tmp_path / "killed", straight, kill)
    resumed = train_checkpoint(
        mini.trunk, about, TrainingInputs(*texts), tmp_path / "killed", straight, quiet, resume=True
    )
    assert resumed.history == nearly(state.history)
    a, b = (parameters(tmp_path / name, mini_path / "base") for name in ("killed", "straight"))
    assert all(torch.allclose(a[key], b[key], rtol=1e-3, atol=1e-5) for key in a)


def test_texts_with_vectors_are_trained_on_them(mini_path: Path, tmp_path: Path) -> None:
    """Two tasks of opposite vectors, whose texts have a letter each after the same word: the vector tells which."""
    lines = [json.dumps({"text": f"the {letter} " * 4, "conditioning": [sign, 1.0]}) for letter, sign in TASKS]
    text = tmp_path / "texts.jsonl"
    text.write_text("\n".join(lines * 8))
    result = call("chameleon_deploy.train", "--base", mini_path / "base", "--text", text, "--validation-text", text,
                  "--conditioning", "given", "--out", tmp_path / "out", "--epochs", 60, "--lr", 0.01, "--patience", 60,
                  "--max-length", 16, "--matmul-precision", "high")  # fmt: skip
    torch.set_float32_matmul_precision("highest")
    assert result.returncode == 0, result.stderr
    assert json.loads((tmp_path / "out" / "training.json").read_text())["settings"]["matmul_precision"] == "high"
    checkpoint = load_checkpoint(tmp_path / "out", base=str(mini_path / "base"))
    assert (checkpoint.config.conditioning_size, checkpoint.config.num_clusters) == (2, 0)
    ids = checkpoint.trunk.tokenizer.encode("the a the a").ids
    logprobs = []
    for sign in (1.0, -1.0):
        adaptation = inference.adapt(checkpoint, [ids], "request", conditioning=np.array([[sign, 1.0]], np.float32))
        logits = inference.RowLogits(checkpoint)(ids, adaptation, 0)[:-1]
        logprobs.append(float(logits.log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None]).sum()))
    assert logprobs[0] > logprobs[1] + 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "a"}', "every line needs"),
        ('{"text": "a", "conditioning": []}', "every line needs"),
        ('{"text": "a", "conditioning": [1, "x"]}', "every line needs"),
        ('{"text": "a", "conditioning": [1e999]}', "every line needs"),
        ('{"text": "a", "conditioning": [1]}\n{"text": "b", "conditioning": [1, 2]}', "every line needs"),
        ("a text", 'string "text"'),
    ],
)
def test_texts_without_a_vector_each(line: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "texts.jsonl").write_text(line)
    with pytest.raises(InputError, match=message):
        read_conditioned([tmp_path / "texts.jsonl"])


def test_the_residual_preset_is_of_the_head(mini: Checkpoint, tmp_path: Path) -> None:
    about = config(targets=choose_targets(mini.trunk, ["mlp"]), hidden_sizes=(3, 3))
    with pytest.raises(InputError, match="leave out --targets"):
        train_checkpoint(
            mini.trunk, about, TrainingInputs(TRAIN, HELD_OUT), tmp_path / "out", PRESETS["residual"].training, quiet
        )


def test_dropout_is_of_the_training_alone(mini: Checkpoint, tmp_path: Path) -> None:
    # With a learning rate of zero, the losses of training and validation on the same texts differ by the dropout.
    for dropout in (0.0, 0.5):
        settings = settings_of(epochs=1, lr=0, batch_size=1000, dropout=dropout)
        state = train_checkpoint(
            mini.trunk, config(), TrainingInputs(TRAIN, TRAIN), tmp_path / str(dropout), settings, quiet
        )
        (epoch,) = state.history
        assert (epoch["train_loss"] == pytest.approx(epoch["validation_loss"], rel=1e-6)) == (dropout == 0)


@pytest.fixture(scope="module")
def lora(mini: Checkpoint, mini_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A LoRA of the trunk and the head, trained a little."""
    out = tmp_path_factory.mktemp("lora") / "lora"
    about = config(regime="lora", hidden_sizes=(), targets=choose_targets(mini.trunk, ["mlp", "lm_head"]))
    train_checkpoint(
        mini.trunk, about, TrainingInputs(TRAIN[:40], HELD_OUT), out, settings_of(epochs=2, lr=1e-2), quiet
    )
    return load_checkpoint(out, base=str(mini_path / "base"))


def test_a_hypernetwork_begins_with_a_lora(mini: Checkpoint, mini_path: Path, lora: Checkpoint, tmp_path: Path) -> None:
    about, texts = config(targets=lora.config.targets), (TRAIN[:40], HELD_OUT)
    for name, lr in (("kept", 0), ("trained", 1e-3)):
        settings = settings_of(epochs=1, lr=lr)
        train_checkpoint(mini.trunk, about, TrainingInputs(*texts, lora=lora), tmp_path / name, settings, quiet)
    kept, trained = (load_checkpoint(tmp_path / name, base=str(mini_path / "base")) for name in ("kept", "trained"))
    for name, factor in lora.factors(kept.centroids).items():
        assert factor.any(), name
        assert torch.equal(kept.factors(kept.centroids)[name], factor), name
        first, second, *_ = trained.factors(kept.centroids)[name]
        assert not torch.equal(first, second), name  # the clusters differ after the first steps


def test_another_lora_does_not_resume_a_training(mini: Checkpoint, lora: Checkpoint, tmp_path: Path) -> None:
    class KilledError(Exception):
        pass

    def kill(what: str, done: int, total: int) -> None:
        if what.startswith("epochs"):
            raise KilledError

    about, texts, out = config(targets=lora.config.targets), (TRAIN[:40], HELD_OUT), tmp_path / "out"
    with pytest.raises(KilledError):
        train_checkpoint(mini.trunk, about, TrainingInputs(*texts, lora=lora), out, settings_of(epochs=1), kill)
    for other in (None, replace(lora, digest="another")):
        with pytest.raises(InputError, match="other texts or settings"):
            train_checkpoint(
                mini.trunk, about, TrainingInputs(*texts, lora=other), out, settings_of(epochs=1), quiet, resume=True
            )


@pytest.mark.parametrize(
    ("changes", "preset", "message"),
    [
        ({"regime": "lora", "hidden_sizes": ()}, "paper", "leave out --from-lora"),
        ({"architecture": "shared"}, "paper", "leave out --from-lora"),
        ({}, "residual", "leave out --from-lora"),
        ({"rank": 2}, "paper", "has rank 4, not 2"),
        ({"alpha": 0.5}, "paper", "has alpha 1.0, not 0.5"),
        ({"targets": ("lm_head",)}, "paper", "has targets .*mlp.* not "),
    ],
)
def test_a_lora_that_cannot_be_begun_with(
    mini: Checkpoint, lora: Checkpoint, tmp_path: Path, changes: dict[str, Any], preset: PresetName, message: str
) -> None:
    about = config(**({"targets": lora.config.targets} | changes))
    with pytest.raises(InputError, match=message):
        train_checkpoint(
            mini.trunk,
            about,
            TrainingInputs(TRAIN, HELD_OUT, lora=lora),
            tmp_path / "out",
            PRESETS[preset].training,
            quiet,
        )
    assert not list(tmp_path.iterdir())


def test_a_lora_of_another_base_is_not_begun_with(mini: Checkpoint, lora: Checkpoint, tmp_path: Path) -> None:
    other = copy.deepcopy(mini.trunk)
    other.head_weight.data[0, 0] += 1
    about = config(targets=lora.config.targets)
    with pytest.raises(InputError, match="another base model"):
        train_checkpoint(
            other, about, TrainingInputs(TRAIN, HELD_OUT, lora=lora), tmp_path / "out", settings_of(), quiet
        )


def test_the_command_begins_with_a_lora(mini_path: Path, tmp_path: Path) -> None:
    text = tmp_path / "texts.jsonl"
    text.write_text("\n".join(f'{{"text": "line {number} of a text"}}' for number in range(40)))
    command: list[Any] = ["chameleon_deploy.train", "--base", mini_path / "base", "--text", text, "--max-length", 16,
                          "--epochs", 1, "--clusters", 2]  # fmt: skip
    trained = call(*command, "--regime", "lora", "--lr", 0.01, "--out", tmp_path / "lora")
    begun = call(*command, "--lr", 0, "--dropout", 0.1, "--from-lora", tmp_path / "lora", "--out", tmp_path / "out")
    assert (trained.returncode, begun.returncode) == (0, 0), trained.stderr + begun.stderr
    lora, network = (load_checkpoint(tmp_path / name) for name in ("lora", "out"))
    for name, factor in lora.factors(network.centroids).items():
        assert torch.equal(network.factors(network.centroids)[name], factor), name


def test_a_hypernetwork_is_no_lora_to_begin_with(mini: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="train one with --regime lora"):
        train_checkpoint(
            mini.trunk, config(), TrainingInputs(TRAIN, HELD_OUT, lora=mini), tmp_path / "out", settings_of(), quiet
        )


def test_early_stopping_keeps_the_best_epoch(mini: Checkpoint, tmp_path: Path) -> None:
    settings = settings_of(epochs=60, lr=0.1, patience=2)  # a step size that soon overshoots
    state = train_checkpoint(mini.trunk, config(), TrainingInputs(TRAIN, HELD_OUT), tmp_path / "out", settings, quiet)
    losses = [entry["validation_loss"] for entry in state.history]
    assert len(losses) == state.best_epoch + 2 < 60
    assert min(losses) == state.best_loss == losses[state.best_epoch - 1]


def test_hidden_states_are_the_trunks(mini: Checkpoint, tmp_path: Path) -> None:
    ids = [[5, 6, 7], [8, 9, 10, 11, 12], [3, 4]]
    masked = cache_hidden_states(mini.trunk, ids, "masked", 8, tmp_path / "masked")
    for row, text in enumerate(ids):
        hidden, targets = masked.batch([row])
        expected, _ = mini.trunk.hidden_states(torch.tensor([text]))
        torch.testing.assert_close(hidden, expected[0, :-1], rtol=1e-4, atol=1e-5)
        assert targets.tolist() == text[1:]
    paper = cache_hidden_states(mini.trunk, ids, "paper", 8, tmp_path / "paper")
    eos = mini.trunk.eos_token_id
    expected, _ = mini.trunk.hidden_states(torch.tensor([ids[0] + [eos] * 5]))
    torch.testing.assert_close(paper.batch([0])[0], expected[0, -1:], rtol=1e-4, atol=1e-5)
    assert paper.batch([0, 1])[1].tolist() == [eos, eos]
    assert isinstance(masked.hidden, np.memmap)


def test_hidden_states_of_other_texts_are_not_reused(mini: Checkpoint, tmp_path: Path) -> None:
    first = cache_hidden_states(mini.trunk, [[5, 6, 7]], "masked", 8, tmp_path)
    kept = np.array(first.hidden)
    again: list[int] = []
    cache_hidden_states(mini.trunk, [[5, 6, 7]], "masked", 8, tmp_path, again.append)
    assert not again  # mapped, not computed
    other = cache_hidden_states(mini.trunk, [[9, 8, 7]], "masked", 8, tmp_path, again.append)
    assert again
    assert not np.array_equal(kept, other.hidden)


def test_chunked_gradients_are_the_whole_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    hypernetwork = Hypernetwork(6, [TargetSpec("lm_head", 6, 11)], 2, (5, 4)).eval()  # without dropout: one network
    u, h, W, targets = torch.randn(6), torch.randn(10, 6), torch.randn(11, 6), torch.randint(0, 11, (10,))
    lora_A, lora_B = hypernetwork(u[None]).values()
    logits = h @ W.T + 0.7 * (h @ lora_A[0].T) @ lora_B[0].T
    torch.nn.functional.cross_entropy(logits, targets).backward()
    whole = [p.grad.clone() for p in hypernetwork.parameters() if p.grad is not None]
    hypernetwork.zero_grad()
    monkeypatch.setattr(head_losses, "CHUNK_POSITIONS", 3)
    states = HiddenStates(h.numpy(), targets.numpy(), np.array([0, len(targets)]), u[None])
    head_losses.HeadLosses(states, W, 0.7).backward(hypernetwork, u, [0], len(targets))
    for expected, p in zip(whole, hypernetwork.parameters(), strict=True):
        torch.testing.assert_close(p.grad, expected, rtol=1e-4, atol=1e-6)


def test_batches_never_mix_clusters() -> None:
    clusters = [torch.arange(0, 7), torch.arange(7, 9), torch.arange(9, 20)]
    batches = fit._shuffled_batches(clusters, 4)
    assert sorted(row for batch in batches for row in batch) == list(range(20))
    for batch in batches:
        assert len(batch) <= 4
        assert any(set(batch) <= set(rows.tolist()) for rows in clusters)


def test_validation_loss_of_a_known_distribution() -> None:
    """Uniform logits cost log(vocab), whatever the cohort."""
    states = HiddenStates(np.zeros((5, 3), np.float32), np.arange(5), np.array([0, 2, 5]), torch.eye(3)[:2])
    losses = head_losses.HeadLosses(states, torch.zeros(7, 3), 1.0)
    loss = fit.validation_loss(None, losses, torch.eye(3)[:2], 32)
    assert abs(loss - np.log(7)) < 1e-6


def test_long_texts_go_on_or_are_cut(mini: Checkpoint) -> None:
    text = TEXTS[0]
    ids = mini.trunk.tokenizer.encode(text).ids
    masked = corpus.encode_texts([text], mini.trunk.tokenizer, "masked", 10)
    assert [i for piece in masked for i in piece] == ids[: sum(map(len, masked))]
    assert corpus.encode_texts([text], mini.trunk.tokenizer, "paper", 10) == [ids[:10]]


def test_texts_begin_with_the_special_tokens_of_the_tokenizer(mini: Checkpoint) -> None:
    """Those to train on, to calibrate with and to measure quality on."""
    tokenizer = Tokenizer.from_str(mini.trunk.tokenizer.to_str())
    first = tokenizer.id_to_token(0)
    tokenizer.post_processor = TemplateProcessing(f"{first} $A", special_tokens=[(first, 0)])
    trunk = replace(mini.trunk, tokenizer=tokenizer)
    pieces = corpus.encode_texts(TEXTS[:2], tokenizer, "masked", 10)
    calibrated = [ids for texts in calibration_texts(trunk, None) for ids in texts.tolist()]
    windows = text_windows(trunk, [], 3, 16)
    for rows, longest in ((pieces, 10), (calibrated, trunk.max_positions), (windows, 16)):
        assert max(map(len, rows)) == longest
        assert all(ids[0] == 0 and 0 not in ids[1:] for ids in rows)


def test_nothing_to_train_on(mini: Checkpoint) -> None:
    with pytest.raises(InputError, match="at least two tokens"):
        corpus.encode_texts(["a"], mini.trunk.tokenizer, "masked", 10)


def test_equal_texts_never_straddle_the_split() -> None:
    train, held_out = corpus.split_texts([str(i % 50) for i in range(1000)], 0.3)
    assert train
    assert held_out
    assert not set(train) & set(held_out)


def test_cohort_rows_cover_every_text_once(mini: Checkpoint) -> None:
    ids, cohorts = cohort_rows(mini, HELD_OUT, batch_size=4)
    assert sorted(row for rows in cohorts for row in rows) == list(range(len(ids)))
    assert max(map(len, cohorts)) <= 4


def test_tiny_model_beats_the_baselines(tmp_path: Path) -> None:
    """The trained checkpoint in models/tiny, on text that it never saw."""
    from chameleon_deploy.reference.tiny import VOCAB_SIZE, corpus_splits

    checkpoint = load_checkpoint(REPOSITORY / "models" / "tiny" / "chameleon")
    splits = corpus_splits().values()
    texts = [text for split in splits for text in split.test[:20]]
    encode = checkpoint.trunk.tokenizer.encode_batch
    train_ids = [e.ids for split in splits for e in encode(split.train)]
    held_out_ids = [e.ids for e in encode(texts)]
    baseline = bigram_perplexity(train_ids, held_out_ids, VOCAB_SIZE)
    base = evaluate(checkpoint, texts, tmp_path, adapted=False).perplexity
    assert base < baseline / 2 < VOCAB_SIZE / 2
    assert evaluate(checkpoint, texts, tmp_path).perplexity < baseline / 2
    assert 1_000_000 <= checkpoint.trunk.num_parameters() <= 3_000_000


def test_a_dataset_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stands in for the `datasets` package, whose hub is not there in tests."""
    import types

    from chameleon_deploy.errors import DatasetError, DependencyError

    module = types.ModuleType("datasets")
    module.load_dataset = lambda *names, split: {"text": ["a text", "  ", "another"]}  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    assert corpus.load_dataset_texts("wikitext", "train") == ["a text", "another"]

    def unreachable(*names: str, split: str) -> None:
        raise ConnectionError("no route")

    module.load_dataset = unreachable  # type: ignore[attr-defined]
    with pytest.raises(DatasetError, match="pass files with --text"):
        corpus.load_dataset_texts("nobody/nothing", "train")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DependencyError, match="pass files with --text"):
        corpus.load_dataset_texts("wikitext", "train")
