"""Export and deployment toolchain for ChameleonLLM.

import chameleon_deploy
runtime = chameleon_deploy.load("models/gpt2")
runtime.generate(["The river"], max_new_tokens=20)
"""

from chameleon_deploy.errors import ChameleonError
from chameleon_deploy.runtime import (
    Adapt,
    Adaptation,
    Conversation,
    Engine,
    EngineOptions,
    Generate,
    Generation,
    Runtime,
    Sampling,
    Score,
    Stream,
    StructuredOutputs,
    Tenant,
    Token,
    load,
)

__version__ = "0.1.0"

__all__ = [
    "Adapt",
    "Adaptation",
    "ChameleonError",
    "Conversation",
    "Engine",
    "EngineOptions",
    "Generate",
    "Generation",
    "Runtime",
    "Sampling",
    "Score",
    "Stream",
    "StructuredOutputs",
    "Tenant",
    "Token",
    "__version__",
    "load",
]
