"""One process of loading.py: load one engine, read a prompt of eight tokens, and print seconds and bytes as JSON.

The clock starts before the engine is imported. An engine that maps its weights has read them with the prompt.
"""

from __future__ import annotations

import time

START = time.perf_counter()

import json  # noqa: E402
import sys  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

PROMPT = list(range(100, 108))


def bundle(path: str, precision: str, threads: int) -> Any:
    import chameleon_deploy

    runtime = chameleon_deploy.load(path, threads=threads)
    runtime.generate([PROMPT], max_new_tokens=1)
    return runtime


def pytorch(path: str, precision: str, threads: int) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.no_grad():
        model(torch.tensor([PROMPT]))
    return model


def ctranslate2(path: str, precision: str, threads: int) -> Any:
    import ctranslate2

    kind = "float32" if precision == "fp32" else precision
    generator: Any = ctranslate2.Generator(path, compute_type=kind, intra_threads=threads, inter_threads=1)
    generator.forward_batch([PROMPT])
    return generator


def openvino(path: str, precision: str, threads: int) -> Any:
    import numpy as np
    import openvino

    config: dict[str, Any] = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    if precision == "fp32":
        config |= {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
    request: Any = openvino.Core().compile_model(path, "CPU", config).create_infer_request()
    positions = np.arange(len(PROMPT))
    request.infer({
        "input_ids": np.array([PROMPT]), "attention_mask": np.ones((1, len(PROMPT)), np.int64),
        "position_ids": positions[None], "logits_positions": positions[-1:], "beam_idx": np.zeros(1, np.int32),
    })  # fmt: skip
    return request


def llama_cpp(path: str, precision: str, threads: int) -> Any:
    import llama_cpp

    llama: Any = llama_cpp.Llama(path, n_ctx=512, n_threads=threads, n_threads_batch=threads, verbose=False)
    llama.eval(PROMPT)
    return llama


LOADERS = {loader.__name__: loader for loader in (bundle, pytorch, ctranslate2, openvino, llama_cpp)}


def main(loader: str, path: str, precision: str, threads: str) -> None:
    engine = LOADERS[loader](path, precision, int(threads))
    seconds = time.perf_counter() - START
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    resident, peak = (int(status[key].split()[0]) * 1024 for key in ("VmRSS", "VmHWM"))
    print(json.dumps({"seconds": seconds, "resident": resident, "peak": peak}), flush=True)
    del engine


if __name__ == "__main__":
    main(*sys.argv[1:])
