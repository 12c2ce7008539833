"""A source in the manifest's terms: dimensions of its base model, its factors and its counts of parameters."""

from __future__ import annotations

import math

from chameleon_deploy.contract.bundle import AdaptationSpec, ModelSpec, Parameters
from chameleon_deploy.contract.manifest import EncoderSpec
from chameleon_deploy.reference.adapters import AdaptedBase
from chameleon_deploy.reference.checkpoint import Checkpoint
from chameleon_deploy.reference.families import require_supported
from chameleon_deploy.reference.hypernetwork import num_parameters
from chameleon_deploy.reference.source import Source
from chameleon_deploy.reference.text_to_lora import TextToLora


def model_spec(checkpoint: Source) -> ModelSpec:
    """Return the dimensions of the base model. Raises UnsupportedBaseError for variants that would be exported
    wrongly.
    """
    trunk, config = checkpoint.trunk, checkpoint.trunk.config
    require_supported(config, checkpoint.name if isinstance(checkpoint, AdaptedBase) else checkpoint.config.base_model)
    spec = trunk.spec
    return ModelSpec(
        architecture=spec.architecture,
        vocab_size=spec.vocab_size,
        hidden_size=spec.hidden_size,
        num_layers=spec.num_layers,
        num_attention_heads=spec.num_attention_heads,
        num_key_value_heads=spec.num_key_value_heads,
        head_dim=spec.head_dim,
        max_positions=spec.max_positions,
        eos_token_id=trunk.eos_token_id,
    )


def adaptation_spec(source: Source) -> AdaptationSpec:
    """Return the manifest's description of the factors."""
    if isinstance(source, AdaptedBase):
        return AdaptationSpec(
            regime="lora" if source.adapters else "base",
            rank=source.rank,
            alpha=1.0,
            targets=source.targets,
            num_clusters=0,
            protocol="masked",
            max_length=source.trunk.max_positions,
            adapters=tuple(source.adapters),
            base_digest=source.base_digest,
            invocation_tokens=source.invocations,
        )
    config = source.config
    return AdaptationSpec(
        regime=config.regime,
        rank=config.rank,
        alpha=config.alpha,
        targets=source.factors.targets,
        num_clusters=config.num_clusters,
        protocol=config.protocol,
        max_length=config.max_length,
        conditioning_size=config.conditioning_size,
    )


def encoder_spec(source: Source) -> EncoderSpec | None:
    """Return the manifest's description of the encoder; None without one."""
    if not isinstance(source, Checkpoint) or source.encoder is None:
        return None
    encoder, released = source.encoder, isinstance(source.factors, TextToLora)
    return EncoderSpec(
        size=encoder.size,
        vocab_size=encoder.model.config.vocab_size,
        max_tokens=encoder.max_tokens,
        prefix_ids=encoder.prefix,
        suffix_ids=encoder.suffix,
        conditioning_norm=math.sqrt(encoder.size) if released else 0.0,  # as in the authors' program
        full_stop=released,
    )


def parameter_counts(source: Source, spec: AdaptationSpec) -> Parameters:
    return Parameters(
        base=source.trunk.num_parameters(),
        factors=spec.rank * sum(spec.factor_widths.values()),
        hypernetwork=num_parameters(source.factors)
        if isinstance(source, Checkpoint) and spec.regime == "chameleon"
        else 0,
    )
