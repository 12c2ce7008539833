"""Closed loops on OpenVINO GenAI's continuous batching: `python experiments/openvino_load.py MODEL --precision f32`.

MODEL is what `optimum-cli export openvino --task text-generation-with-past` writes. Prints tokens per second of
requests as `bench.load URL` sends them: random ids below 256. The pipeline has no server, so no HTTP is in its figure.
Needs openvino-genai, in an environment of its own.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import openvino as ov
import openvino_genai as genai


def closed_loop(pipeline: genai.ContinuousBatchingPipeline, asked: list[np.ndarray], streams: int, new: int) -> float:
    """Return tokens per second, with `streams` requests in the pipeline at a time."""
    config = genai.GenerationConfig(max_new_tokens=new, ignore_eos=True)
    waiting, running, tokens = list(enumerate(asked))[::-1], {}, 0
    start = time.perf_counter()
    while waiting or running:
        while waiting and len(running) < streams:
            number, ids = waiting.pop()
            running[number] = pipeline.add_request(number, ov.Tensor(ids[None].astype(np.int64)), config)
        pipeline.step()
        for number, handle in list(running.items()):
            while handle.can_read():
                tokens += sum(len(output.generated_ids) for output in handle.read().values())
            if handle.get_status() != genai.GenerationStatus.RUNNING:
                del running[number]
    return tokens / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--precision", default="f32", choices=["f32", "bf16", "default"])
    parser.add_argument("--cache", default="default", help="KV_CACHE_PRECISION, such as f32 or u8")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batched-tokens", type=int, default=256, help="tokens in one step of the pipeline")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=64)
    arguments = parser.parse_args()
    scheduler = genai.SchedulerConfig()
    scheduler.max_num_seqs, scheduler.max_num_batched_tokens = arguments.streams, arguments.batched_tokens
    scheduler.cache_size, scheduler.enable_prefix_caching = 1, False
    options = {"INFERENCE_NUM_THREADS": arguments.threads}
    if arguments.precision != "default":
        options["INFERENCE_PRECISION_HINT"] = arguments.precision
    if arguments.cache != "default":
        options["KV_CACHE_PRECISION"] = arguments.cache
    pipeline = genai.ContinuousBatchingPipeline(arguments.model, scheduler, "CPU", options)
    asked = list(np.random.default_rng(0).integers(0, 256, (arguments.requests, arguments.prompt_tokens)))
    closed_loop(pipeline, asked[:8], arguments.streams, 4)
    print(f"{closed_loop(pipeline, asked, arguments.streams, arguments.new_tokens):.1f} tokens/s")


if __name__ == "__main__":
    main()
