"""What texts are conditioned on: every text once, and each control what its name says."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from chameleon_deploy.evaluate import conditioning
from chameleon_deploy.evaluate.conditioning import Conditioning

clusterings = st.lists(st.integers(0, 4), min_size=1, max_size=40)


def embeddings_for(cluster_ids: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(len(cluster_ids))
    return torch.randn(len(cluster_ids), 6), torch.tensor(cluster_ids)


def vectors(given: Conditioning) -> torch.Tensor:
    return given.vectors[given.ids]


@settings(max_examples=50, deadline=None)
@given(clusterings, st.integers(1, 9))
def test_cohorts_stay_in_their_cluster_and_cover_every_text(cluster_ids: list[int], size: int) -> None:
    embeddings, clusters = embeddings_for(cluster_ids)
    cohorts = conditioning.cohort_mean(embeddings, clusters, size)
    rows = [row for _, members in cohorts.rows(3) for row in members]
    assert sorted(rows) == list(range(len(clusters)))
    for number in range(len(cohorts.vectors)):
        members = (cohorts.ids == number).nonzero().flatten()
        assert 1 <= len(members) <= size
        assert len(clusters[members].unique()) == 1
        torch.testing.assert_close(cohorts.vectors[number], embeddings[members].mean(0))


@settings(max_examples=30, deadline=None)
@given(clusterings)
def test_a_cohort_of_one_is_mode_request(cluster_ids: list[int]) -> None:
    embeddings, clusters = embeddings_for(cluster_ids)
    assert torch.equal(vectors(conditioning.cohort_mean(embeddings, clusters, 1)), embeddings)
    assert torch.equal(vectors(conditioning.own_embedding(embeddings)), embeddings)


@settings(max_examples=30, deadline=None)
@given(clusterings)
def test_another_cluster_is_never_ones_own(cluster_ids: list[int]) -> None:
    embeddings, clusters = embeddings_for(cluster_ids)
    means = {k: embeddings[clusters == k].mean(0) for k in set(cluster_ids)}
    for cluster, vector in zip(
        cluster_ids, vectors(conditioning.other_cluster_mean(embeddings, clusters)), strict=True
    ):
        source = next(k for k, mean in means.items() if torch.equal(mean, vector))
        assert source != cluster or len(means) == 1


@settings(max_examples=30, deadline=None)
@given(clusterings, st.integers(0, 5))
def test_shuffling_deals_the_same_vectors(cluster_ids: list[int], seed: int) -> None:
    embeddings, clusters = embeddings_for(cluster_ids)
    cohorts = conditioning.cohort_mean(embeddings, clusters, 4)
    dealt = conditioning.shuffled(cohorts, seed)
    assert torch.equal(dealt.vectors, cohorts.vectors)
    assert torch.equal(dealt.ids.sort().values, cohorts.ids.sort().values)
    assert torch.equal(dealt.ids, conditioning.shuffled(cohorts, seed).ids)


def test_mixed_batches_ignore_clusters() -> None:
    embeddings = torch.randn(5, 3)
    mixed = conditioning.mixed_mean(embeddings, 2)
    assert mixed.ids.tolist() == [0, 0, 1, 1, 2]
    torch.testing.assert_close(mixed.vectors[1], embeddings[2:4].mean(0))
