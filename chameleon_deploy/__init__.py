"""Export and deployment toolchain for ChameleonLLM.

import chameleon_deploy
runtime = chameleon_deploy.load("models/gpt2")
runtime.generate(["The river"], max_new_tokens=20)
"""

from chameleon_deploy.errors import ChameleonError
from chameleon_deploy.runtime import Adaptation, Generation, Runtime, Sampling, Score, Token, load

__version__ = "0.1.0"

__all__ = [
    "Adaptation",
    "ChameleonError",
    "Generation",
    "Runtime",
    "Sampling",
    "Score",
    "Token",
    "__version__",
    "load",
]
