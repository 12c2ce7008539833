"""`python -m chameleon_deploy.inspect`: show what a bundle holds."""

from __future__ import annotations

import json
import re
from collections import Counter
from typing import Annotated, Any

import msgspec
import typer

from chameleon_deploy.contract.bundle import AdaptationSpec, Bundle, Manifest, default_mode, open_bundle
from chameleon_deploy.contract.manifest import CHAT_TEMPLATE, PRECISION_USES
from chameleon_deploy.errors import DependencyError
from chameleon_deploy.runtime.decode.session import IntegerWeights, integer_weights
from chameleon_deploy.terminal import console
from chameleon_deploy.terminal.table import Sheet


def main(
    bundle: console.BundleArgument,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as one JSON object.")] = False,
) -> None:
    """Check every file of a bundle against its manifest, and show its dimensions, graphs, sizes and parity."""
    opened = open_bundle(console.bundle_path(bundle))
    if as_json:
        print(json.dumps(record(opened)))
        return
    manifest = opened.manifest
    console.show(Sheet(["property", "value"], _summary(opened)))
    graphs = [
        [name, graph.role, graph.cache or "", ", ".join(graph.providers), graph.file, _bytes(opened, graph.file)]
        for name, graph in manifest.graphs.items()
    ]
    files = [[name, _bytes(opened, name)] for name in manifest.files]
    console.show(
        Sheet(["graph", "role", "cache", "providers", "file", "bytes"], graphs, "Graphs"),
        Sheet(["file", "bytes"], files, "Files"),
    )


def record(bundle: Bundle) -> dict[str, Any]:
    """Return the manifest with derived facts: digest, size, adapters, modes and default mode, and the type of the
    weights in integer products on this machine.
    """
    manifest = bundle.manifest
    return {
        "path": str(bundle.path),
        "digest": bundle.digest,
        "size": _size(manifest),
        "adapters": _adapters(manifest),
        "modes": list(manifest.adaptation.modes),
        "default_mode": default_mode(manifest.adaptation),
        "integer_weights": _integer_weights(bundle),
        **msgspec.to_builtins(manifest),
    }


def _summary(bundle: Bundle) -> list[list[str]]:
    manifest = bundle.manifest
    model, adaptation, parameters, parity = manifest.model, manifest.adaptation, manifest.parameters, manifest.parity
    default = default_mode(adaptation)
    figures = f"{parity.checks} checks, largest logit difference {parity.max_abs_logit_difference:.2g}" if (
        parity.verified and parity.max_abs_logit_difference is not None
    ) else "not verified"  # fmt: skip
    if parity.accepted_kl is not None:
        figures += f", accepting a mean KL of {parity.accepted_kl:g}"
    return [
        ["bundle", str(bundle.path)],
        ["digest", bundle.digest],
        ["size", f"{_size(manifest) / 1e6:,.1f} MB in {len(manifest.files) + 1} files"],
        ["precision", f"{manifest.precision}: {PRECISION_USES[manifest.precision]}"],
        ["integer weights", f"{_integer_weights(bundle)} on this machine" if _integer_weights(bundle) else "none"],
        ["model", f"{model.architecture}, {model.num_layers} layers, hidden {model.hidden_size:,}, "
                  f"vocabulary {model.vocab_size:,}, {model.max_positions:,} positions"],
        ["attention", f"{model.num_attention_heads} heads of {model.head_dim}, {model.num_key_value_heads} for keys "
                      "and values"],
        ["regime", f"{adaptation.regime}, protocol {adaptation.protocol}, at most {adaptation.max_length} tokens"],
        ["targets", "; ".join(_targets(adaptation))],
        ["rank", f"{adaptation.rank}, alpha {adaptation.alpha:g}"],
        ["clusters", str(adaptation.num_clusters) if not adaptation.conditioning_size
                     else f"none: the caller gives vectors of {adaptation.conditioning_size:,} numbers"],
        ["encoder", _encoder(manifest)],
        ["adapters", ", ".join(adaptation.adapters) or str(_adapters(manifest))],
        ["modes", ", ".join(f"{mode} (default)" if mode == default else mode for mode in adaptation.modes)],
        ["chat template", f"{_bytes(bundle, CHAT_TEMPLATE)} bytes" if CHAT_TEMPLATE in manifest.files else "none"],
        ["parameters", f"base {parameters.base:,}, hypernetwork {parameters.hypernetwork:,}, "
                       f"one set of factors {parameters.factors:,}"],
        ["engine limits", ", ".join(f"{k} {v:,}" for k, v in msgspec.structs.asdict(manifest.limits).items())],
        ["parity", figures],
        ["checkpoint", manifest.checkpoint_digest],
        ["exported with", ", ".join(f"{name} {version}" for name, version in manifest.tools.items())],
    ]  # fmt: skip


def _integer_weights(bundle: Bundle) -> IntegerWeights | None:
    """Return None without integer products, and without ONNX Runtime, which has to be asked."""
    try:
        found = (integer_weights(bundle, graph) for graph in bundle.manifest.graphs.values())
        return next((weights for weights in found if weights), None)
    except DependencyError:
        return None


def _adapters(manifest: Manifest) -> int:
    """Return the number of trained adapters, one without a name included; none if a hypernetwork generates factors."""
    return len(manifest.adaptation.adapters) or int(manifest.adaptation.regime == "lora")


def _encoder(manifest: Manifest) -> str:
    spec = manifest.encoder
    if spec is None:
        return "none"
    return f"embeddings of {spec.size:,} numbers, at most {spec.max_tokens:,} tokens, vocabulary {spec.vocab_size:,}"


def _targets(adaptation: AdaptationSpec) -> list[str]:
    """Return the targets with their sizes; those that differ only in the number of their layer are one, with a `*`."""
    alike = Counter(
        f"{re.sub(r'[.][0-9]+[.]', '.*.', target.name)} [{target.out_features:,} x {target.in_features:,}]"
        for target in adaptation.targets
    )
    return [f"{name} in {count} layers" if "*" in name else name for name, count in alike.items()]


def _size(manifest: Manifest) -> int:
    return sum(file.size for file in manifest.files.values())


def _bytes(bundle: Bundle, name: str) -> str:
    return f"{bundle.manifest.files[name].size:,}"


if __name__ == "__main__":
    console.run(main)
