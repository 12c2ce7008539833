"""Runs programs that a model wrote, each in a child process with limits.

A program gets `seconds` of wall clock and of processor time, `memory` bytes of address space, and standard streams
that go nowhere. It has no capability, starts no process or thread, opens no socket, sends no signal, and writes, makes
or removes no file. It needs Linux with seccomp and Landlock (5.13), and no right that a user does not have.

It does not protect files from being read, or their modes from being changed, and it does not stop a program that looks
for the word by which the child says that it passed. What is worse than a small model's answers belongs into a virtual
machine.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import resource
import secrets
import signal
import struct
import subprocess
import sys
import tempfile
from typing import Literal

Outcome = Literal["passed", "failed", "timeout"]

SECONDS = 10.0
MEMORY = 2**30
CANNOT_CONFINE = 77  # exit status
# The architecture's number, and those of socket, clone, clone3, kill, tkill, tgkill, ptrace, process_vm_writev,
# pidfd_send_signal, io_uring_setup, and on x86 fork and vfork.
DENIED = {
    "x86_64": (0xC000003E, (41, 56, 435, 62, 200, 234, 101, 311, 424, 425, 57, 58)),
    "aarch64": (0xC00000B7, (198, 220, 435, 129, 130, 131, 117, 271, 424, 425)),
}
X32 = 0x40000000  # numbers from here on are those of x86's other calling convention


class SandboxError(Exception):
    """This system cannot confine a program."""


def run(program: str, seconds: float = SECONDS, memory: int = MEMORY) -> Outcome:
    """Run a Python program; it passes if it reaches its end. Raises SandboxError."""
    word = secrets.token_hex()
    request = json.dumps({"program": program, "word": word, "seconds": seconds, "memory": memory})
    command = [sys.executable, "-I", __file__]
    with (
        tempfile.TemporaryDirectory() as directory,
        subprocess.Popen(  # noqa: S603  (our own words)
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=directory, text=True,
            env={"PATH": os.defpath, "HOME": directory}, start_new_session=True,
        ) as child,
    ):  # fmt: skip
        try:
            said, _ = child.communicate(request, timeout=seconds)
        except subprocess.TimeoutExpired:
            child.kill()
            child.communicate()
            return "timeout"
    if child.returncode == CANNOT_CONFINE:
        raise SandboxError("this system cannot confine a program: it needs Linux with seccomp and Landlock")
    if child.returncode == -signal.SIGXCPU:
        return "timeout"
    return "passed" if said == word else "failed"


def main() -> None:
    """Be the child: read a program from standard input, and write its word to standard output if it passed."""
    request = json.load(sys.stdin)
    answer, null = os.dup(1), os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    try:
        confine(request["seconds"], request["memory"])
    except (OSError, KeyError):
        os._exit(CANNOT_CONFINE)
    exec(compile(request["program"], "<program>", "exec"), {"__name__": "program"})  # noqa: S102  (what it is for)
    os.write(answer, request["word"].encode())
    os._exit(0)


def confine(seconds: float, memory: int) -> None:
    """Give up what a program must not have. Raises OSError, or KeyError for a processor that is not known."""
    limits = {
        resource.RLIMIT_CPU: int(seconds) + 1,
        resource.RLIMIT_AS: memory,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_CORE: 0,
    }
    for limit, value in limits.items():
        resource.setrlimit(limit, (value, value))
    libc = ctypes.CDLL(None, use_errno=True)
    _check(libc.prctl(38, 1, 0, 0, 0))  # PR_SET_NO_NEW_PRIVS
    _check(libc.capset(struct.pack("II", 0x20080522, 0), bytes(24)))  # _LINUX_CAPABILITY_VERSION_3: none of them
    _forbid_writing(libc)
    _forbid_calls(libc)


def _forbid_writing(libc: ctypes.CDLL) -> None:
    """Forbid to write, make and remove files, by a Landlock ruleset without a rule."""
    rights = ctypes.c_uint64(1 << 1 | sum(1 << right for right in range(4, 13)))  # WRITE_FILE, REMOVE_DIR to MAKE_SYM
    rules = libc.syscall(444, ctypes.byref(rights), ctypes.c_size_t(8), 0)  # landlock_create_ruleset
    _check(libc.syscall(446, rules, 0))  # landlock_restrict_self


def _forbid_calls(libc: ctypes.CDLL) -> None:
    """Forbid system calls, by a seccomp filter: a program of classic BPF over (number, architecture)."""
    architecture, numbers = DENIED[platform.machine()]
    load, equal, at_least, end = 0x20, 0x15, 0x35, 0x06
    allow, deny = 0x7FFF0000, 0x00050000 | 13  # SECCOMP_RET_ERRNO with EACCES
    to_deny = len(numbers) + 1  # instructions from the first comparison of numbers to `deny`
    steps = [
        (load, 0, 0, 4),
        (equal, 0, to_deny + 2, architecture),
        (load, 0, 0, 0),
        (at_least, to_deny, 0, X32),
        *((equal, to_deny - 1 - i, 0, number) for i, number in enumerate(numbers)),
        (end, 0, 0, allow),
        (end, 0, 0, deny),
    ]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
    program = struct.pack("HxxxxxxP", len(steps), ctypes.addressof(code))
    _check(libc.prctl(22, 2, ctypes.create_string_buffer(program), 0, 0))  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER


def _check(result: int) -> None:
    if result != 0:
        raise OSError(ctypes.get_errno(), "a limit could not be set")


if __name__ == "__main__":
    main()
