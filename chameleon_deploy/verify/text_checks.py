"""Check texts rather than token ids: the bundle's tokenizer equals the reference's, for any other rows of the batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from chameleon_deploy.contract.bundle import Mode
from chameleon_deploy.runtime import Runtime
from chameleon_deploy.verify.gates import Check


def check_texts(runtime: Runtime, tokenizer: Any, rows: Sequence[Sequence[int]]) -> Iterator[Check]:
    """Check that texts in a batch have the token ids that the reference's tokenizer gives each of them alone.

    tokenizer  the reference's
    rows       their text is encoded again, which may differ from the rows if a character was cut
    """
    longest = max(map(len, rows))
    texts = [tokenizer.decode(ids, skip_special_tokens=False) for ids in rows]
    alone = {text: tokenizer.encode(text, add_special_tokens=False).ids for text in texts}
    alone = {text: ids for text, ids in alone.items() if 0 < len(ids) <= longest}  # within the limits, like the rows
    mode: Mode | None = "none" if runtime.manifest.adaptation.conditioning_size else None  # else vectors are needed
    ours = runtime.score(list(alone), mode=mode)
    differ = sum(score.token_ids != ids for score, ids in zip(ours, alone.values(), strict=True))
    yield Check("texts whose token ids in a batch differ", differ, 0, note=f"{len(alone)} texts")
    from_texts, from_ids = (
        runtime.generate(list(prompts), max_new_tokens=1, mode=mode) for prompts in (alone, alone.values())
    )
    differ = sum(a != b for a, b in zip(from_texts, from_ids, strict=True))
    yield Check("texts whose first generated token differs from their token ids'", differ, 0)
