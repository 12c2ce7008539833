"""Mistral: a Llama, with a window in all layers or in none."""

from __future__ import annotations

from chameleon_deploy.reference.families import llama
from chameleon_deploy.reference.families.spec import Family

MISTRAL = Family("mistral", "Mistral 7B", llama.spec, llama.SUPPORTED)
