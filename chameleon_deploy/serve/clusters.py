"""/v1/adapt and /v1/clusters: where texts lie among the centroids."""

from __future__ import annotations

import numpy as np

from chameleon_deploy.serve.call import Call
from chameleon_deploy.serve.prompts import encode
from chameleon_deploy.serve.schemas import AdaptItem, AdaptResponse, Cluster, ClusterList, TextsRequest


async def adapt(call: Call[TextsRequest]) -> AdaptResponse:
    return await call.off_loop_if_large(lambda: _adapt(call))


def _adapt(call: Call[TextsRequest]) -> AdaptResponse:
    body, served = call.body, call.served
    model = served.models.resolve(body.model, body.mode).model
    ids = [row[: body.adapt_tokens] for row in encode(body.input, "input", served)]
    embeddings, cluster_ids = served.runtime.embed(ids)
    items = [
        AdaptItem(
            index=i,
            cluster_id=int(cluster_ids[i]),
            embedding=embedding.tolist(),
            distances=np.linalg.norm(served.centroids - embedding, axis=1).tolist(),
            num_tokens=len(ids[i]),
        )
        for i, embedding in enumerate(embeddings)
    ]
    return AdaptResponse(model=model, data=items)


async def clusters(call: Call[None]) -> ClusterList:
    sizes = call.served.cluster_sizes
    return ClusterList(
        data=[
            Cluster(id=i, size=sizes[i], centroid=centroid.tolist()) for i, centroid in enumerate(call.served.centroids)
        ]
    )
