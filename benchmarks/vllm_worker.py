"""vLLM in a process and an environment of its own: reads batches as JSON lines, and prints laps and tokens.

    PYTHON_WITH_VLLM vllm_worker.py MODEL THREADS DTYPE NAME=PEFT_DIRECTORY...

All rows are added before the first step, so that they share calls as vLLM schedules them. Only vLLM and what it brings
is imported here.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any


def main(model: str, threads: int, dtype: str, adapters: dict[str, str]) -> None:
    os.environ |= {
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, sorted(os.sched_getaffinity(0))[:threads])),
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # steps run in this process
    }
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # vLLM logs to standard output
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    llm = LLM(model, dtype=dtype, skip_tokenizer_init=True, max_model_len=512, max_num_seqs=8, enable_lora=True,
              max_loras=len(adapters), max_lora_rank=16, enable_prefix_caching=False)  # fmt: skip
    engine: Any = llm.llm_engine
    requests = {name: LoRARequest(name, number, path) for number, (name, path) in enumerate(adapters.items(), start=1)}
    print(json.dumps({"opened": True}), file=answers, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        count = asked["num_tokens"]
        params = SamplingParams(temperature=0, max_tokens=count, min_tokens=count, ignore_eos=True, detokenize=False)
        for row, (ids, name) in enumerate(zip(asked["rows"], asked["adapters"], strict=True)):
            engine.add_request(str(row), {"prompt_token_ids": ids}, params, lora_request=requests[name])
        found: dict[str, list[int]] = {}
        while engine.has_unfinished_requests():
            begun = len(found)
            for output in engine.step():
                found[output.request_id.split("-")[0]] = list(output.outputs[0].token_ids)
            if begun < len(found) == len(asked["rows"]):
                print(json.dumps({"lap": "prefill"}), file=answers, flush=True)
        print(json.dumps({"tokens": [found[str(row)] for row in range(len(found))]}), file=answers, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3], dict(word.split("=", 1) for word in sys.argv[4:]))
