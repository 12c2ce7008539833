"""Describe the machine and the library versions of a measurement."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path

ENGINES = ("onnxruntime", "onnxruntime-gpu", "torch", "transformers", "ctranslate2", "openvino", "nncf", "torchao",
           "llama_cpp_python", "numpy")  # fmt: skip
# The processor flags that decide which kernels a matrix product uses.
FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "amx_bf16")
# Variables that change the threads of PyTorch, CTranslate2 and llama.cpp: idle ones that do not spin (OMP_WAIT_POLICY=
# PASSIVE) make a step of llama.cpp take four times as long.
THREADING = ("OMP_", "GOMP_", "KMP_", "MKL_", "OPENBLAS_")
# Limit, use and statistics of the memory of the process's control group, in versions 2 and 1.
CONTROL_GROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current", "/sys/fs/cgroup/memory.stat"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes",
     "/sys/fs/cgroup/memory/memory.stat"),
)  # fmt: skip
IDENTITY = ("model name", "CPU part", "flags", "Features")  # fields of a processor; "CPU part" and "Features" on ARM


def describe_machine(integer_weights: str | None = None) -> dict[str, str]:
    """Return the processor, its matrix instructions, the system, and the version of every installed engine.

    integer_weights  of the measured bundle on this machine, see `Runtime`; None if it has no integer products

    Also the variables of the environment that change the threads of other engines, if there are any.
    """
    processor = _processor()
    flags = set(processor.get("flags", "").split())
    machine = {
        "processor": processor.get("model name", platform.machine()),
        "instructions": " ".join(flag for flag in FLAGS if flag in flags),
        "system": platform.platform(),
        "python": platform.python_version(),
    }
    if integer_weights is not None:
        machine["integer weights"] = integer_weights
    if variables := [f"{name}={value}" for name, value in os.environ.items() if name.startswith(THREADING)]:
        machine["environment"] = " ".join(sorted(variables))
    installed = {str(distribution.name) for distribution in metadata.distributions()}
    return machine | {name: metadata.version(name) for name in ENGINES if name in installed}


def describe_processor() -> str:
    """Return what decides which kernels an engine uses: the processor's model and all its flags."""
    processor = _processor()
    return " ".join([platform.machine(), *(processor.get(key, "") for key in IDENTITY)])


def usable_cores() -> int:
    """Return the number of processors that this process may run on; all of them if the system does not say."""
    affinity = getattr(os, "sched_getaffinity", None)  # only Linux has it
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def free_memory() -> int | None:
    """Return the bytes of memory that this process may still take; None if the system does not say.

    It is what Linux calls available, or less in a control group with a limit: what the limit leaves beside its use, of
    which file pages that nobody has read for long do not count, as in Kubernetes.
    """
    try:
        fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        free = 1024 * int(fields["MemAvailable"].split()[0])
    except (OSError, KeyError, ValueError):
        return None
    return min([free, *filter(None, map(_left_in_group, CONTROL_GROUPS))])


def _left_in_group(files: tuple[str, str, str]) -> int | None:
    """Return what a control group leaves, at least one byte; None without a limit."""
    try:
        limit, used, statistics = (Path(file).read_text() for file in files)
        inactive = dict(line.split() for line in statistics.splitlines()).get("inactive_file", "0")
        return max(1, int(limit) - (int(used) - int(inactive)))
    except (OSError, ValueError):  # "max" is no number
        return None


def _processor() -> dict[str, str]:
    """Return the first core's lines of /proc/cpuinfo; on other systems the name that Python knows."""
    if not Path("/proc/cpuinfo").exists():
        return {"model name": platform.processor() or platform.machine()}
    first = Path("/proc/cpuinfo").read_text().strip().split("\n\n")[0]
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in first.splitlines())}
