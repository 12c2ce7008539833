"""The preset `residual`: a trained LoRA for all texts, and for each cluster a counted correction of it.

The difference between clusters is counted rather than trained, because a cluster has too few texts for training. On the
training texts of cluster k the shared LoRA expects token v `expected[k, v]` times (the sum of its probabilities) and
`observed[k, v]` is how often it occurred; the logit of v should then be higher by about log(observed / expected). With
pseudo-counts (a Gamma prior on a Poisson rate) that is

    log_ratio[k, v] = log((observed[k, v] + c) / (expected[k, v] + c))

and c is chosen on the validation texts, from values that include infinity: no correction at all.

All of it is an ordinary hypernetwork, Linear ReLU Linear ReLU Linear with hidden sizes (K, K):

    first layer   unit k detects cluster k: a ridge regression of "is in cluster k" on the centred and whitened text
                  embeddings, folded into weight and bias; 1 at its own centroid, 0 at the others (ReLU)
    second layer  the identity
    last layer    bias: the shared LoRA, in rows 1 to rank - 1 of the factors; row 0 of lora_A is a direction in which
                  every hidden state is about 1, and column k of the weight holds log_ratio[k] in column 0 of lora_B
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from chameleon_deploy.reference.clustering import nearest_centroids
from chameleon_deploy.reference.fit import cohorts, validation_loss
from chameleon_deploy.reference.head_losses import CHUNK_POSITIONS, HeadLosses
from chameleon_deploy.reference.hidden_states import HiddenStates
from chameleon_deploy.reference.hypernetwork import Hypernetwork, StaticLoRA

PSEUDO_COUNTS = (1.0, 3.0, 10.0, 30.0, math.inf)
RIDGE = 0.1  # of the detectors, as a share of the embeddings' mean variance
LEAST_MARGIN = 0.1  # minimum between a cluster's centroid and its nearest rival, before the scaling; bounds the weights


@torch.no_grad()
def add_residual(
    lora: StaticLoRA, train: HeadLosses, validation: HeadLosses, centroids: Tensor, batch_size: int
) -> tuple[Hypernetwork, dict[float, float]]:
    """Return a hypernetwork of rank lora.rank + 1 that returns the LoRA and each cluster's correction of it.

    lora        of the head
    centroids   [K, hidden]
    batch_size  texts of a cohort, when the validation texts are scored

    Also returns the validation loss of every pseudo-count, in nats per position. The hypernetwork has the best one.
    """
    vocab_size, hidden_size = train.head_weight.shape
    num_clusters, rank = len(centroids), lora.rank + 1
    hypernetwork = Hypernetwork(hidden_size, lora.targets, rank, (num_clusters, num_clusters)).eval()
    first, second, last = hypernetwork.linears()
    weight, bias = detectors(train.embeddings.double(), centroids.double())
    first.weight.copy_(weight)
    first.bias.copy_(bias)
    second.weight.copy_(torch.eye(num_clusters))
    second.bias.zero_()
    lora_A = torch.cat([constant_direction(train.states)[None], lora.lora_A[0]])
    lora_B = torch.nn.functional.pad(lora.lora_B[0], (1, 0))
    last.bias.copy_(torch.cat([lora_A.flatten(), lora_B.flatten()]))
    last.weight.zero_()
    residual = last.weight[rank * hidden_size :].view(vocab_size, rank, num_clusters)[:, 0]  # [vocab, K]
    expected, observed = count(lora, train, centroids)
    losses = {}
    for pseudo_count in PSEUDO_COUNTS:
        residual.copy_(log_ratio(expected, observed, pseudo_count).T / train.alpha)
        losses[pseudo_count] = validation_loss(hypernetwork, validation, centroids, batch_size)
    residual.copy_(log_ratio(expected, observed, min(losses, key=losses.__getitem__)).T / train.alpha)
    return hypernetwork.requires_grad_(False), losses


def log_ratio(expected: Tensor, observed: Tensor, pseudo_count: float) -> Tensor:
    """Return by how much the logits of each cluster are too low. Counts [K, vocab] -> [K, vocab]"""
    if math.isinf(pseudo_count):
        return torch.zeros_like(expected)
    return torch.log((observed + pseudo_count) / (expected + pseudo_count))


@torch.no_grad()
def count(lora: StaticLoRA, losses: HeadLosses, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """Return how often each token is expected and observed in each cluster's texts: two float32 [K, vocab]."""
    states, (lora_A, lora_B) = losses.states, (lora.lora_A[0], lora.lora_B[0])
    expected, observed = torch.zeros(2, len(centroids), len(losses.head_weight))
    clusters = nearest_centroids(states.embeddings, centroids)
    for k in range(len(centroids)):
        for rows in cohorts([(clusters == k).nonzero().flatten()], 32):
            hidden, targets = states.batch(rows)
            observed[k].index_add_(0, targets, torch.ones(len(targets)))
            for h in hidden.split(CHUNK_POSITIONS):
                logits = (h @ losses.head_weight.T).addmm_(h @ lora_A.T, lora_B.T, alpha=losses.alpha)
                expected[k] += torch.softmax(logits, 1, out=logits).sum(0)
    return expected, observed


def constant_direction(states: HiddenStates) -> Tensor:
    """Return the direction [hidden] whose product with every hidden state is closest to 1, by ridge regression.

    The last norm gives all hidden states a large common component, so that such a direction exists.
    """
    size = states.hidden.shape[1]
    gram, total = torch.zeros(size, size, dtype=torch.float64), torch.zeros(size, dtype=torch.float64)
    for start in range(0, len(states.hidden), CHUNK_POSITIONS):
        h = torch.from_numpy(states.hidden[start : start + CHUNK_POSITIONS].astype("float64"))
        gram += h.T @ h
        total += h.sum(0)
    gram.diagonal().add_(1e-3 * gram.diagonal().mean())
    direction: Tensor = torch.linalg.solve(gram, total)
    return direction.float()


def detectors(embeddings: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """Return weight [K, hidden] and bias [K] of `relu(u @ weight.T + bias)`, which is close to 1 only for cluster k's
    own u.

    embeddings [texts, hidden] of the training texts, centroids [K, hidden]
    """
    mean = embeddings.mean(0)
    centred = embeddings - mean
    covariance = centred.T @ centred / len(centred)
    ridge = RIDGE * covariance.diagonal().mean() * torch.eye(len(mean), dtype=covariance.dtype)
    member = torch.nn.functional.one_hot(nearest_centroids(embeddings, centroids), len(centroids)).double()
    slopes = torch.linalg.solve(covariance + ridge, centred.T @ member / len(centred)).T
    at_centroids = (centroids - mean) @ slopes.T  # [centroid, unit]
    own = at_centroids.diagonal()
    rival = at_centroids.masked_fill(torch.eye(len(own), dtype=torch.bool), -torch.inf).amax(0)
    rival = torch.where(rival.isfinite(), rival, own - 1)  # a single cluster has no rival
    scale = 1 / (own - rival).clamp(min=LEAST_MARGIN)
    return slopes * scale[:, None], -(slopes @ mean + rival) * scale
