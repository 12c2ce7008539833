"""Phi-3: a Llama with single projections to queries, keys and values and to gate and up, and a window in all layers or
in none. Phi-4-mini turns some channels of a head only.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from chameleon_deploy.reference.families import llama
from chameleon_deploy.reference.families.spec import DecoderSpec, Family

NAMES = replace(llama.NAMES, qkv=(llama.NAMES.joined_qkv,), up=(llama.NAMES.joined_up,))


def spec(config: Any) -> DecoderSpec:
    """Return the switches of a configuration."""
    return replace(llama.spec(config), names=NAMES)


PHI3 = Family("phi3", "Phi-3, Phi-3.5-mini, Phi-4-mini", spec, llama.SUPPORTED)
