"""The families of base models: one module and one `Family` object each. No other module of export knows a family."""

from __future__ import annotations

from chameleon_deploy.export.families.family import Family
from chameleon_deploy.export.families.gpt2 import GPT2
from chameleon_deploy.export.families.llama import LLAMA

FAMILIES: dict[str, Family] = {family.name: family for family in (GPT2, LLAMA)}


def family_of(architecture: str) -> Family:
    """Return the family by ModelSpec.architecture, which is the model_type of a Hugging Face configuration."""
    return FAMILIES[architecture]
