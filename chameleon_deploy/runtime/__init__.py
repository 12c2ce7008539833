"""The light runtime: numpy, ONNX Runtime and tokenizers; never torch, transformers or onnx."""

from chameleon_deploy.runtime.adaptation import Adapt, Adaptation
from chameleon_deploy.runtime.chat.conversation import Conversation
from chameleon_deploy.runtime.engine.engine import Engine, EngineOptions
from chameleon_deploy.runtime.engine.stream import Stream
from chameleon_deploy.runtime.engine.tenants import Tenant
from chameleon_deploy.runtime.generation import Generate, Generation, Token
from chameleon_deploy.runtime.runtime import Runtime, load
from chameleon_deploy.runtime.sampling_settings import Sampling
from chameleon_deploy.runtime.scoring import Score
from chameleon_deploy.runtime.structured_outputs import StructuredOutputs

__all__ = [
    "Adapt",
    "Adaptation",
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
    "load",
]
