"""Every family from one table of switches: in a mixed batch each row is transformers' own float64 model with its PEFT
adapter, and a wrong switch is seen.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch

from chameleon_deploy import Adapt, Generate, Runtime
from chameleon_deploy.contract.bundle import FloatArray, open_bundle
from chameleon_deploy.export.exporter import export_bundle
from chameleon_deploy.reference import inference
from chameleon_deploy.reference.adapters import AdaptedBase, AdapterLogits, load_adapted
from chameleon_deploy.reference.checkpoint import Checkpoint, CheckpointConfig, build_factors
from chameleon_deploy.reference.families import FAMILIES
from chameleon_deploy.reference.families.spec import DecoderSpec
from chameleon_deploy.reference.inference import RowLogits
from chameleon_deploy.reference.model import Trunk, trunk_from
from chameleon_deploy.reference.targets import choose_targets
from chameleon_deploy.terminal.progress import silent
from chameleon_deploy.verify.gates import GATES
from chameleon_deploy.verify.run import VerifyOptions, verify_bundle
from tests.devices import on_cpu
from tests.families import small_model

ROWS = [[(7 * i + 3 * j) % 512 for j in range(3 + 5 * i)] for i in range(6)]
NAMES = ["all", None, "head", "all", "head", "all"]  # of ROWS
STATIC = Adapt(mode="static", adapters=NAMES)
GRAPHS = ("decoder", "decoder_cpu")
# Families whose layers differ: plain attention, a gated MLP, fused matrices, norms of heads with a tied head. On these
# alone is tried what the tests of every family leave little to doubt: bf16 goes through the pass of fp16, int4 through
# those of int8, and `verify` compares with a reference that is itself compared with float64.
SOME = ("gpt2", "llama", "phi3", "gemma3_text")


@dataclass
class Made:
    """A family's small model with two adapters, and transformers' model of each row in float64."""

    adapted: AdaptedBase
    double: Any

    def expected(self, rows: Sequence[Sequence[int]]) -> list[FloatArray]:
        """Return the logits [tokens, vocab] of each row alone, with its adapter."""
        return [self._of_row(ids, name) for ids, name in zip(rows, NAMES, strict=True)]

    @torch.no_grad()
    def _of_row(self, ids: Sequence[int], name: str | None) -> Any:
        inputs = torch.tensor([list(ids)])
        if name is None:
            with self.double.disable_adapter():
                return self.double(inputs).logits[0].numpy()
        self.double.set_adapter(name)
        return self.double(inputs).logits[0].numpy()


@pytest.fixture(scope="module")
def all_made() -> dict[str, Made]:
    return {}


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def made(family: str, all_made: dict[str, Made], llama: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Made:
    if family not in all_made:
        path = tmp_path_factory.mktemp(family)
        model = small_model(family)
        double = peft.get_peft_model(
            copy.deepcopy(model), peft.LoraConfig("CAUSAL_LM", r=3, target_modules="all-linear"), "all"
        )
        attended = choose_targets(trunk_from(model, None), ["attention"])[0].rpartition(".")[2]
        double.add_adapter("head", peft.LoraConfig("CAUSAL_LM", r=2, target_modules=["lm_head", attended]))
        for name, parameter in double.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.15)
        double.save_pretrained(path)
        directories = {name: path / name for name in ("all", "head")}
        adapted = load_adapted(family, directories, trunk_from(model, llama.trunk.tokenizer))
        all_made[family] = Made(adapted, double.double().eval())
    return all_made[family]


def logits_of(runtime: Runtime, rows: Sequence[Sequence[int]]) -> list[FloatArray]:
    """Return the logits [tokens, vocab] of each row of one mixed batch."""
    factors = runtime.adapt(rows, STATIC, on_device=True).factors
    pieces: list[list[Any]] = [[] for _ in rows]
    for start, logits in runtime.decoder.all_logits(rows, factors):
        values = np.asarray(logits)
        for i, ids in enumerate(rows):
            pieces[i].append(values[i, : max(0, len(ids) - start)].copy())
    return [np.concatenate(parts) for parts in pieces]


def differences(ours: Sequence[FloatArray], theirs: Sequence[FloatArray]) -> tuple[float, float]:
    """Return the largest difference as a share of the scale, and the mean square as a share of theirs."""
    scale = max(float(np.abs(logits).max()) for logits in theirs)
    largest = max(float(np.abs(a - b).max()) for a, b in zip(ours, theirs, strict=True))
    squares = [np.square(a - b).mean() / np.square(b).mean() for a, b in zip(ours, theirs, strict=True)]
    return largest / scale, float(np.mean(squares))


def continued(runtime: Runtime) -> list[list[int]]:
    """Return the rows with tokens that the runtime has decoded one by one, in slots."""
    generations = runtime.generate(ROWS, Generate(max_new_tokens=12), STATIC)
    return [[*ids, *generation.token_ids] for ids, generation in zip(ROWS, generations, strict=True)]


def share_of_greedy(rows: Sequence[Sequence[int]], logits: Sequence[FloatArray]) -> float:
    """Return which share of the tokens after ROWS has the highest logit."""
    right = [
        row[i] == values[i - 1].argmax()
        for row, start, values in zip(rows, map(len, ROWS), logits, strict=True)
        for i in range(start, len(row))
    ]
    return float(np.mean(right))


def test_every_row_is_transformers_float64_model(made: Made, tmp_path: Path) -> None:
    """And so is the reference of `verify`."""
    export_bundle(made.adapted, tmp_path / "bundle")
    expected = made.expected(ROWS)
    reference = AdapterLogits(made.adapted)
    theirs = [reference(ids, NAMES, row).numpy() for row, ids in enumerate(ROWS)]
    assert differences(theirs, expected)[0] < 1e-5
    for graph in GRAPHS:
        runtime = on_cpu(open_bundle(tmp_path / "bundle"), graph)
        assert differences(logits_of(runtime, ROWS), expected)[0] < 1e-5
        rows = continued(runtime)
        assert share_of_greedy(rows, made.expected(rows)) == 1


@pytest.mark.parametrize("family", SOME)
def test_the_gates_of_verify_pass(made: Made, tmp_path: Path) -> None:
    export_bundle(made.adapted, tmp_path / "bundle")
    checks, record = verify_bundle(tmp_path / "bundle", made.adapted, silent, VerifyOptions(threads=1))
    assert record["verified"], [check for check in checks if not check.passed]


@pytest.mark.parametrize(
    ("family", "precision", "graphs", "limit"),
    [
        (family, *case)
        for families, case in (
            (FAMILIES, ("fp16", GRAPHS[1:], 1e-4)),
            (SOME, ("bf16", GRAPHS[1:], 1e-3)),
            (FAMILIES, ("int8", GRAPHS, 5e-3)),
            (SOME, ("int4", GRAPHS, 3e-1)),
        )
        for family in families
    ],
)
def test_other_precisions(precision: Any, graphs: Sequence[str], limit: float, made: Made, tmp_path: Path) -> None:
    """Near the same model, and decoding token by token sees what reading whole sees."""
    export_bundle(made.adapted, tmp_path / "bundle", precision=precision)
    expected = made.expected(ROWS)
    for graph in graphs:
        runtime = on_cpu(open_bundle(tmp_path / "bundle"), graph)
        assert differences(logits_of(runtime, ROWS), expected)[1] < limit
        rows = continued(runtime)
        assert share_of_greedy(rows, logits_of(runtime, rows)) > 0.95


def test_most_of_a_small_model_is_its_vocabulary(llama: Checkpoint, tmp_path: Path) -> None:
    """Of Gemma 3 270M two thirds: a tied int8 matrix has two names, and as float32 twice the fourfold size."""
    model = small_model("qwen3", vocab_size=8192, num_hidden_layers=1)
    adapted = load_adapted("qwen3", {}, trunk_from(model, llama.trunk.tokenizer))
    export_bundle(adapted, tmp_path / "bundle", precision="int8")
    assert open_bundle(tmp_path / "bundle").manifest.precision == "int8"


def test_generated_updates_of_head_and_trunk(made: Made, tmp_path: Path) -> None:
    torch.manual_seed(0)
    trunk = made.adapted.trunk
    about = CheckpointConfig(
        regime="chameleon", base_model=".", rank=2, hidden_sizes=(8, 4), num_clusters=2,
        targets=choose_targets(trunk, ["all"]),
    )  # fmt: skip
    centroids = torch.nn.functional.normalize(torch.randn(2, trunk.spec.hidden_size), dim=1)
    factors = build_factors(about, trunk).eval().requires_grad_(False)
    checkpoint = Checkpoint(about, trunk, factors, centroids, "0" * 64)
    export_bundle(checkpoint, tmp_path / "bundle")
    adaptation, plain = (inference.adapt(checkpoint, ROWS, mode) for mode in ("request", "none"))
    for graph in GRAPHS:
        runtime = on_cpu(open_bundle(tmp_path / "bundle"), graph)
        for row, score in enumerate(runtime.score(ROWS, mode="request")):
            next_ids = torch.tensor(ROWS[row][1:])[:, None]
            expected, base = (
                RowLogits(checkpoint)(ROWS[row], of, row).log_softmax(-1)[:-1].gather(1, next_ids)[:, 0].numpy()
                for of in (adaptation, plain)
            )
            assert GATES["fp32"].max_abs_logit is not None
            assert np.abs(score.token_logprobs - expected).max() < GATES["fp32"].max_abs_logit
            assert np.abs(expected - base).max() > 0.1


def _every_layer(**changes: Any) -> Any:
    return lambda spec: {"layers": tuple(replace(layer, **changes) for layer in spec.layers)}


def _swapped(spec: DecoderSpec) -> dict[str, Any]:
    return {"layers": tuple(replace(a, rotary=b.rotary) for a, b in zip(spec.layers, spec.layers[::-1], strict=True))}


# Of a family: switches that are wrong, and what they would be.
FAULTS: list[tuple[str, Any]] = [
    ("gpt2", {"activation": "gelu"}),
    ("llama", {"scale": 0.3}),
    ("mistral", _every_layer(window=None)),
    ("mistral", _every_layer(window=9)),
    ("qwen2", _every_layer(window=8)),
    ("qwen3", {"query_key_norm": None}),
    ("granite", {"embedding_multiplier": 2.0}),
    ("granite", {"residual_multiplier": 1.0}),
    ("granite", {"logits_multiplier": 1.0}),
    ("smollm3", _every_layer(rotary="rotary_emb")),
    ("smollm3", _every_layer(rotary=None)),
    ("gpt_neox", {"parallel": False}),
    ("gpt_neox", {"interleaved": False}),
    ("olmo2", {"epsilon": 1e-2}),
    ("phi3", _every_layer(window=7)),
    ("gemma2", {"attention_cap": None}),
    ("gemma2", {"logits_cap": None}),
    ("gemma2", {"norm_offset": 0.0}),
    ("gemma3_text", _swapped),
]


# Without the addresses of functions: two processes must give a test the same name.
@pytest.mark.parametrize(("family", "fault"), FAULTS, ids=lambda value: None if callable(value) else str(value))
def test_a_wrong_switch_is_seen(fault: Any, made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, right = made.expected(ROWS), made.adapted.trunk.spec
    wrong = replace(right, **(fault(right) if callable(fault) else fault))
    monkeypatch.setattr(Trunk, "spec", property(lambda trunk: wrong))
    export_bundle(made.adapted, tmp_path / "bundle")
    for graph in GRAPHS:
        runtime = on_cpu(open_bundle(tmp_path / "bundle"), graph)
        assert differences(logits_of(runtime, ROWS), expected)[0] > 1e-4
