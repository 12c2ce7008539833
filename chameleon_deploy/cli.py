"""`chameleon-deploy SUBCOMMAND`: the modules' commands as one program.

A subcommand's module is imported when it is the one that is asked for, so that `chameleon-deploy
generate` works where only the runtime is installed.
"""

from __future__ import annotations

import runpy
import sys
from typing import NoReturn

COMMANDS = {
    "train": "train the head of a frozen base model into a checkpoint",
    "evaluate": "held-out perplexity of checkpoints beside their base",
    "export": "turn a checkpoint into a bundle",
    "verify": "prove a bundle equal to its PyTorch reference",
    "generate": "continue prompts",
    "score": "log-probability and perplexity of texts",
    "bench": "measure a bundle against the PyTorch reference",
    "gpu_check": "verify and measure bundles on this machine's GPU",
}


def main() -> NoReturn:
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("--help", "-h"):
        print("usage: chameleon-deploy SUBCOMMAND ...\n")
        for command, description in COMMANDS.items():
            print(f"  {command:10} {description}")
        sys.exit(0)
    if name not in COMMANDS:
        print(f"error: {name!r} is not one of {', '.join(COMMANDS)} [usage]", file=sys.stderr)
        sys.exit(2)
    sys.argv[:2] = [f"chameleon-deploy {name}"]
    runpy.run_module(f"chameleon_deploy.{name}", run_name="__main__")
    sys.exit(0)


if __name__ == "__main__":
    main()
