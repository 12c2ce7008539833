"""Writes tests/data/released/VERSION, bundles that every later version loads: `python -m tests.make_released`.

    generated/          a GPT-2 whose head a hypernetwork updates, in fp32
    adapters/           a Llama with two adapters and a chat template, in int8
    later.safetensors   an adapter file for it
    answers.json        calls of these bundles, and the tokens that they gave

It is run once, when a version is released, and refuses to write a version that is there. Both languages read the files.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import chameleon_deploy
from chameleon_deploy.contract.adapter_file import write_adapter
from chameleon_deploy.contract.peft_lora import read_peft
from chameleon_deploy.runtime import Runtime, Sampling
from tests.make_data import VOCAB_SIZE, make_bundle
from tests.shared_data import DATA, released_answers

TEMPLATE = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
LORAS: dict[str, dict[str, Any]] = {
    "legal": {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj", "lm_head"]},
    "code": {"r": 3, "lora_alpha": 3, "target_modules": ["o_proj", "down_proj"]},
    "later": {"r": 1, "lora_alpha": 2, "target_modules": ["v_proj", "down_proj"]},
}
ROWS = [[5, 9, 301, 17], [44, 8], [121, 7, 7, 200, 63, 2]]
MODES = ("none", "centroid", "request", "cohort")
ADAPTERS: list[list[str | dict[str, float] | None]] = [
    [None, "legal", "code", "legal", "code", None],
    ["later", {"legal": 0.5, "code": 0.25}, None, "later"],
]
LATER = {"later": "later.safetensors"}
NEW_TOKENS = 4
LEAST_GAP = 0.15  # of the two highest log-probabilities, so that kernels of another processor choose the same tokens


def main() -> None:
    out = DATA / "released" / chameleon_deploy.__version__
    if out.exists():
        sys.exit(f"{out} is there: the files of a released version do not change")
    out.mkdir(parents=True)
    make_bundle(out / "generated", "chameleon", "masked", 2, 0, seed=0)
    make_adapters(out)
    calls: list[dict[str, Any]] = [{"bundle": "generated", "mode": mode, "rows": ROWS} for mode in MODES]
    runtime = chameleon_deploy.load(out / "adapters", threads=1)
    runtime.load_adapter("later", out / LATER["later"])
    for adapters in ADAPTERS:
        rows = [clear_row(runtime, adapter, seed) for seed, adapter in enumerate(adapters)]
        calls.append({"bundle": "adapters", "adapters": adapters, "rows": rows, "load": LATER})
    calls = [{**call, "max_new_tokens": NEW_TOKENS} for call in calls]
    found = zip(calls, released_answers(out, calls), strict=True)
    answers = [{**call, "token_ids": token_ids} for call, token_ids in found]
    (out / "answers.json").write_text("[\n" + ",\n".join(map(json.dumps, answers)) + "\n]\n")


def clear_row(runtime: Runtime, adapter: Any, seed: int) -> list[int]:
    """Return a prompt whose continuation is not a matter of rounding."""
    generator = random.Random(seed)
    while True:
        row = [generator.randrange(1, VOCAB_SIZE) for _ in range(generator.randint(2, 6))]
        sampling = Sampling(logprobs=2)
        (found,) = runtime.generate([row], adapters=[adapter], max_new_tokens=NEW_TOKENS, sampling=sampling)
        assert found.top_logprobs is not None
        gaps = [best - second for (_, best), (_, second) in found.top_logprobs]
        if len(gaps) == NEW_TOKENS and min(gaps) >= LEAST_GAP:
            return row


def make_adapters(out: Path) -> None:
    from chameleon_deploy.export.exporter import export_bundle
    from chameleon_deploy.reference.adapters import load_adapted
    from chameleon_deploy.reference.python_corpus import KINDS, python_texts
    from chameleon_deploy.reference.tiny import save_base, train_tokenizer
    from tests.adapters import save_adapter
    from tests.families import small_model

    texts = [text for kind in KINDS for text in python_texts(kind, 60)]
    with tempfile.TemporaryDirectory() as directory:
        base = Path(directory) / "base"
        save_base(small_model("llama", vocab_size=VOCAB_SIZE), train_tokenizer(texts, VOCAB_SIZE), base)
        paths = {
            name: save_adapter(base, Path(directory) / name, seed, 0.3, **options)
            for seed, (name, options) in enumerate(LORAS.items())
        }
        later = paths.pop("later")
        source = load_adapted(str(base), paths)
        source.trunk.chat = replace(source.trunk.chat, template=TEMPLATE)
        export_bundle(source, out / "adapters", precision="int8")
        factors = read_peft(later, source.trunk.linear_layers())
        spec = chameleon_deploy.load(out / "adapters").manifest.adaptation
        write_adapter(out / "later.safetensors", factors, spec)


if __name__ == "__main__":
    main()
