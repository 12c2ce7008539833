"""Which machine and which versions figures were taken with."""

from __future__ import annotations

import platform
from importlib import metadata
from pathlib import Path

ENGINES = ("onnxruntime", "onnxruntime-gpu", "torch", "transformers", "ctranslate2", "openvino", "nncf", "numpy")
# Of the many flags of a processor, those that decide which kernels a matrix product gets.
FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "amx_bf16")
IDENTITY = ("model name", "CPU part", "flags", "Features")  # of a processor; the second and the last on ARM


def describe_machine() -> dict[str, str]:
    """The processor, what it can multiply with, the system, and the version of every installed engine."""
    processor = _processor()
    flags = set(processor.get("flags", "").split())
    machine = {
        "processor": processor.get("model name", platform.machine()),
        "instructions": " ".join(flag for flag in FLAGS if flag in flags),
        "system": platform.platform(),
        "python": platform.python_version(),
    }
    installed = {str(distribution.name) for distribution in metadata.distributions()}
    return machine | {name: metadata.version(name) for name in ENGINES if name in installed}


def describe_processor() -> str:
    """What decides which kernels an engine takes: the processor's model and everything that it can do."""
    processor = _processor()
    return " ".join([platform.machine(), *(processor.get(key, "") for key in IDENTITY)])


def _processor() -> dict[str, str]:
    """The lines of /proc/cpuinfo on the first core."""
    first = Path("/proc/cpuinfo").read_text().strip().split("\n\n")[0]
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in first.splitlines())}
