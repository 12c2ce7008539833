"""Log-probabilities of given texts, off the event loop and a prompt at a time, so that requests take turns."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from chameleon_deploy.runtime import Adaptation
from chameleon_deploy.runtime.prompt_logprobs import prompt_logprobs
from chameleon_deploy.runtime.sampling import Choice
from chameleon_deploy.runtime.scoring import Score, score_rows
from chameleon_deploy.serve.call import Call
from chameleon_deploy.serve.models import Meant
from chameleon_deploy.serve.prompts import encode
from chameleon_deploy.serve.schemas import Conditioning, ScoreItem, ScoreResponse, TextsRequest
from chameleon_deploy.serve.service import Served


async def score_prompts(
    served: Served,
    ids: list[list[int]],
    meant: Meant,
    tenant: str | None,
    adapt_tokens: int | None,
    conditioning: Conditioning | None,
    count: int,
) -> list[list[Choice]]:
    """The choices of every prompt's tokens but its first, with `count` alternatives each."""
    adaptation = await served.score(adapt, served, ids, meant, tenant, adapt_tokens, conditioning)
    return [
        await served.score(prompt_logprobs, row, served.runtime.decoder, adaptation.factors.rows(np.array([i])), count)
        for i, row in enumerate(ids)
    ]


async def score(call: Call[TextsRequest]) -> ScoreResponse:
    """/v1/score: what `Runtime.score` gives."""
    body, served = call.body, call.served
    meant = served.models.resolve(body.model, body.mode)
    ids = await call.off_loop_if_large(lambda: encode(body.input, "input", served))
    adaptation = await served.score(adapt, served, ids, meant, call.tenant, body.adapt_tokens, body.conditioning)
    items = [_item(i, await served.score(_score_row, served, ids, adaptation, i)) for i in range(len(ids))]
    return ScoreResponse(model=meant.model, mode=meant.mode, data=items)


def adapt(
    served: Served,
    ids: Sequence[Sequence[int]],
    meant: Meant,
    tenant: str | None,
    adapt_tokens: int | None,
    conditioning: Conditioning | None = None,
) -> Adaptation:
    """The texts of one request, as one cohort in the modes that have them."""
    tenants = [tenant] * len(ids) if meant.mode == "tenant" else None
    adapters = None if meant.adapter is None else [meant.adapter] * len(ids)
    rows = [row[:adapt_tokens] for row in ids]
    return served.runtime.adapt(
        rows, mode=meant.mode, tenants=tenants, adapters=adapters, conditioning=conditioning, on_device=True
    )


def _score_row(served: Served, ids: list[list[int]], adaptation: Adaptation, i: int) -> Score:
    alone = Adaptation(
        adaptation.embeddings[[i]], adaptation.cluster_ids[[i]], adaptation.factors.rows(np.array([i]))
    )  # fmt: skip
    return score_rows([ids[i]], served.runtime.decoder, alone)[0]


def _item(index: int, score: Score) -> ScoreItem:
    return ScoreItem(
        index=index,
        cluster_id=score.cluster_id,
        logprob=score.logprob,
        perplexity=None if math.isnan(score.perplexity) else score.perplexity,
        token_ids=score.token_ids,
        token_logprobs=score.token_logprobs,
    )
