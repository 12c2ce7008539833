"""Which machine and which versions figures were taken with."""

from __future__ import annotations

import platform
from importlib import metadata
from pathlib import Path

ENGINES = ("onnxruntime", "onnxruntime-gpu", "torch", "transformers", "ctranslate2", "openvino", "nncf", "numpy")
# Of the many flags of a processor, those that decide which kernels a matrix product gets.
FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "amx_bf16")


def describe_machine() -> dict[str, str]:
    """The processor, what it can multiply with, the system, and the version of every installed engine."""
    processor = {"model name": platform.machine(), "flags": ""}
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() in processor:
            processor[key.strip()] = value.strip()
    flags = set(processor["flags"].split())
    machine = {
        "processor": processor["model name"],
        "instructions": " ".join(flag for flag in FLAGS if flag in flags),
        "system": platform.platform(),
        "python": platform.python_version(),
    }
    installed = {str(distribution.name) for distribution in metadata.distributions()}
    return machine | {name: metadata.version(name) for name in ENGINES if name in installed}
