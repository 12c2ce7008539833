"""lm-evaluation-harness as a client: its tasks, a run of it, and what the runtime says of its samples."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from chameleon_deploy import Runtime
from chameleon_deploy.reference.python_corpus import KINDS, python_texts

POSITIONS = 128  # of the model
TOLERANCE = 1e-4

TASK = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
"""
CHOICE = """\
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: choices
doc_to_target: answer
target_delimiter: ""
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
ROLLING = """\
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}, {metric: bits_per_byte}]
"""

GENERATION = """\
output_type: generate_until
doc_to_text: "{{text}}"
doc_to_target: ""
generation_kwargs: {until: ["\\n\\n"], max_gen_toks: 8, do_sample: false, temperature: 0}
metric_list: [{metric: bypass}]
"""


def write_tasks(directory: Path, runtime: Runtime, documents: int) -> Path:
    """So many questions, whose choices are greedy, nearly greedy and any text, and texts of up to four windows."""
    texts = [text for kind in KINDS for text in python_texts(kind, documents // 2)]
    questions = [text[:60].rstrip() for text in texts[:documents]]
    greedy = runtime.generate(questions, max_new_tokens=4, mode="none")
    choices = [[g.text, g.text + " and", " and more"] for g in greedy]
    docs: dict[str, list[Any]] = {
        "choice": [
            {"question": question, "choices": texts, "answer": 0}
            for question, texts in zip(questions, choices, strict=True)
        ],
        "rolling": [{"text": text[:600]} for text in texts[documents : 2 * documents]],
    }
    directory.mkdir(exist_ok=True)
    for (name, items), rest in zip(docs.items(), (CHOICE, ROLLING), strict=True):
        file = directory / f"{name}.jsonl"
        file.write_text("".join(json.dumps(item) + "\n" for item in items))
        (directory / f"{name}.yaml").write_text(TASK.format(name=name, file=file) + rest)
    return directory


def write_questions(directory: Path, texts: Sequence[str]) -> Path:
    """The task `generation`: texts to answer."""
    directory.mkdir(exist_ok=True)
    file = directory / "generation.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (directory / "generation.yaml").write_text(TASK.format(name="generation", file=file) + GENERATION)
    return directory


def evaluate(
    tasks: Path, out: Path, model: str, arguments: str, names: Sequence[str] = ("choice", "rolling"), *options: str
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What lm-eval reports: its metrics, and its samples in order."""
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tasks / "cache")}
    subprocess.run(
        [os.environ["LM_EVAL"], "run", "--model", model, "--model_args", arguments, "--tasks", ",".join(names),
         "--include_path", tasks, "--output_path", out, "--log_samples", "--device", "cpu", *options],
        check=True, env=os.environ | offline,
    )  # fmt: skip
    results = json.loads(next(out.rglob("results_*.json")).read_text())["results"]
    samples = [
        json.loads(line)
        for name in names
        for line in next(out.rglob(f"samples_{name}_*.jsonl")).read_text().splitlines()
    ]
    return results, sorted(samples, key=lambda sample: ("question" not in sample["doc"], sample["doc_id"]))


def evaluate_server(tasks: Path, out: Path, url: str, model: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The same from a server, with its tokenizer."""
    return evaluate(
        tasks, out, "local-completions",
        f"model={model},base_url={url}/v1/completions,tokenizer_backend=remote,num_concurrent=4,"
        f"tokenized_requests=True,max_length={POSITIONS}",
    )  # fmt: skip


def answers_of_server(tasks: Path, out: Path, url: str, model: str) -> list[str]:
    """What a server answers to the questions, each as a conversation."""
    arguments = f"model={model},base_url={url}/v1/chat/completions,num_concurrent=4,max_length={POSITIONS}"
    _, samples = evaluate(tasks, out, "local-chat-completions", arguments, ["generation"], "--apply_chat_template")
    return [sample["resps"][0][0] for sample in samples]


def likelihoods(sample: dict[str, Any]) -> list[tuple[float, bool | None]]:
    """The log-likelihood of each choice and whether it is greedy, or the one of a whole text."""
    found = [response[0] for response in sample["resps"]]
    return [
        (float(each[0]), str(each[1]) == "True") if isinstance(each, list) else (float(each), None) for each in found
    ]


def expected(runtime: Runtime, sample: dict[str, Any]) -> list[tuple[float, bool | None]]:
    """The same by the runtime."""
    if "text" in sample["doc"]:
        return [(rolling(runtime, runtime.tokenizer.encode(sample["doc"]["text"]).ids), None)]
    question, choices = sample["doc"]["question"], sample["doc"]["choices"]
    context, found = runtime.encode([question])[0], list[tuple[float, bool | None]]()
    length = len(context)
    for whole in runtime.encode([question + choice for choice in choices]):
        ids = context + whole[length:]  # as lm-eval does, even where a token of the whole spans both
        logprobs = runtime.score([ids], mode="none")[0].token_logprobs[length - 1 :]
        prefixes = [ids[:end] for end in range(length, len(ids))]
        next_ids = [g.token_ids[0] for g in runtime.generate(prefixes, max_new_tokens=1, mode="none")]
        found.append((sum(logprobs), next_ids == ids[length:]))
    return found


def rolling(runtime: Runtime, ids: list[int]) -> float:
    """The sum over windows of 126 tokens, each with one token before it; the last window is filled up by its past."""
    size, total = POSITIONS - 2, 0.0
    ids = [runtime.manifest.model.eos_token_id, *ids]
    for start in range(1, len(ids), size):
        end = min(start + size, len(ids))
        begin = max(0, end - size - 1)
        total += sum(runtime.score([ids[begin:end]], mode="none")[0].token_logprobs[start - begin - 1 :])
    return total
