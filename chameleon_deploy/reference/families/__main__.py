"""Print the families that can be deployed as a table in Markdown: python -m chameleon_deploy.reference.families"""

from __future__ import annotations

from collections.abc import Iterator

import transformers

from chameleon_deploy.reference.families import FAMILIES
from chameleon_deploy.reference.families.spec import DecoderSpec

ACTIVATIONS = {"gelu": "GELU", "gelu_tanh": "GELU (tanh)", "silu": "SiLU"}


def table() -> str:
    """Return a row for each family, of what its default configuration in transformers has."""
    rows = ["| `model_type` | models | norms | positions | attention | MLP |", "|---|---|---|---|---|---|"]
    for family in FAMILIES.values():
        spec = family.spec(transformers.AutoConfig.for_model(family.name))
        cells = f"`{family.name}`", family.models, _norms(spec), _positions(spec), _attention(spec), _mlp(spec)
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


def _norms(spec: DecoderSpec) -> str:
    names = spec.names
    places = {"before": names.mlp_norm, "after": names.mlp_post_norm}
    place = " and ".join(place for place, norm in places.items() if norm)
    return f"{'layer' if spec.norm == 'layer' else 'RMS'}, {place}"


def _positions(spec: DecoderSpec) -> str:
    if spec.names.position_embedding:
        return "learned"
    kinds = {layer.rotary for layer in spec.layers} - {None}
    notes = [
        f"{spec.rotary_dim / spec.head_dim:.0%} of a head" if spec.rotary_dim < spec.head_dim else "",
        "not in every layer" if any(layer.rotary is None for layer in spec.layers) else "",
        f"{len(kinds)} kinds" if len(kinds) > 1 else "",
    ]
    return ", ".join(["rotary", *filter(None, notes)])


def _attention(spec: DecoderSpec) -> str:
    windowed = [layer.window is not None for layer in spec.layers]
    normed = {"head": "norms of heads", "all": "norms of queries and keys", None: ""}[spec.query_key_norm]
    notes = [
        "window" if all(windowed) else "window in some layers" if any(windowed) else "",
        normed,
        "caps" if spec.attention_cap or spec.logits_cap else "",
    ]
    return ", ".join(filter(None, notes)) or "plain"


def _mlp(spec: DecoderSpec) -> str:
    notes: Iterator[str] = filter(None, ["gated" if spec.gated else "", "beside attention" if spec.parallel else ""])
    return ", ".join([ACTIVATIONS[spec.activation], *notes])


def main() -> None:
    """Print the table."""
    print(table(), end="")


if __name__ == "__main__":
    main()
