"""Clients of chat that are too large for the environment of the tests: see `make scale`.

CLIENTS is an environment with langchain-openai and guidellm, LM_EVAL the program of lm-evaluation-harness.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from chameleon_deploy import Sampling
from chameleon_deploy.reference.checkpoint import Checkpoint
from tests.lm_evaluation import answers_of_server, write_questions
from tests.serving import running
from tests.speaking_model import chat_source, speaking_bundle, system_for

pytestmark = pytest.mark.clients

CALL = '<tool_call>\n{"name": "weather", "arguments": {"place": "Rome"}}\n</tool_call>'
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "Now.", "parameters": {
    "type": "object", "properties": {"place": {"type": "string"}}}}}]  # fmt: skip
# The usual loop: ask, run the tools that the answer calls, and ask again with their results.
LOOP = """
import json, sys
from langchain_core.messages import HumanMessage, SystemMessage, ToolMessage
from langchain_openai import ChatOpenAI

given = json.load(sys.stdin)
model = ChatOpenAI(base_url=given["url"], api_key="none", model=given["model"], temperature=0, max_retries=0)
model = model.bind_tools(given["tools"])
messages, called = [HumanMessage("Hello")], []
for system in given["systems"]:  # one for each turn, which chooses what the model says
    answer = model.invoke([SystemMessage(system), *messages])
    messages.append(answer)
    for call in answer.tool_calls:
        called.append([call["name"], call["args"]])
        messages.append(ToolMessage("Sun", tool_call_id=call["id"]))
stream = [part.content for part in model.stream([SystemMessage(given["systems"][-1]), *messages[:-1]])]
print(json.dumps({"called": called, "text": messages[-1].content, "streamed": "".join(stream)}))
"""


def program(name: str) -> str:
    return str(Path(os.environ["CLIENTS"]) / "bin" / name)


def test_langchain_runs_tools(mini: Checkpoint, tmp_path: Path) -> None:
    speaking_bundle(
        ["Hm.", f"I look.\n{CALL}", "It is sunny."], mini.trunk.tokenizer, tmp_path / "bundle", chat_source()
    )
    with running(tmp_path / "bundle", mode="none") as server:
        template = server.runtime.chat_template
        function = {"name": "weather", "arguments": '{"place": "Rome"}'}
        history: list[dict[str, Any]] = [
            {"role": "user", "content": "Hello"},
            {"role": "assistant", "content": "I look.", "tool_calls": [{"id": "x", "function": function}]},
            {"role": "tool", "tool_call_id": "x", "content": "Sun"},
        ]

        systems = [system_for(1, template, history[:1], TOOLS), system_for(2, template, history, TOOLS)]
        given = {"url": f"{server.url}/v1", "model": server.name, "tools": TOOLS, "systems": systems}
        done = subprocess.run([program("python"), "-c", LOOP], input=json.dumps(given), capture_output=True, text=True,
                              check=False, timeout=120)  # fmt: skip
    assert done.returncode == 0, done.stderr
    expected = {"called": [["weather", {"place": "Rome"}]], "text": "It is sunny.", "streamed": "It is sunny."}
    assert json.loads(done.stdout) == expected


def test_guidellm_measures_chat(mini: Checkpoint, mini_path: Path, tmp_path: Path) -> None:
    speaking_bundle(["The river runs."], mini.trunk.tokenizer, tmp_path / "bundle", chat_source())
    out = tmp_path / "out"
    out.mkdir()
    with running(tmp_path / "bundle", mode="none") as server:
        options = {"--backend": f"kind=openai_http,target={server.url},request_format=/v1/chat/completions",
                   "--profile": "kind=concurrent,streams=2", "--constraint": "kind=max_requests,count=4",
                   "--data": "kind=synthetic_text,prompt_tokens=16,output_tokens=6",
                   "--tokenizer": f"kind=huggingface_auto,model={mini_path / 'base'}"}  # fmt: skip
        words = [word for option in options.items() for word in option]
        done = subprocess.run([program("guidellm"), "run", *words], capture_output=True, text=True, check=False,
                              timeout=300, cwd=out, env=os.environ | {"HF_HUB_OFFLINE": "1"})  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    (report,) = out.rglob("*.json")
    (benchmark,) = json.loads(report.read_text())["benchmarks"]
    assert len(benchmark["requests"]["successful"]) == 4


def test_lm_eval_reads_the_answers_of_the_runtime(mini: Checkpoint, tmp_path: Path) -> None:
    speaking_bundle(["The river runs."], mini.trunk.tokenizer, tmp_path / "bundle", chat_source())
    texts = [f"What is {thing}?" for thing in ("a river", "rain", "a\nline", "the <|endoftext|>")]
    with running(tmp_path / "bundle", mode="none") as server:
        tasks = write_questions(tmp_path / "tasks", texts)
        found = answers_of_server(tasks, tmp_path / "out", server.url, server.name)
        sampling = Sampling(stop=["\n\n"])
        wanted = [
            server.runtime.chat([{"role": "user", "content": text}], max_new_tokens=8, sampling=sampling, mode="none")
            for text in texts
        ]
    assert found == [generation.text for generation in wanted]
