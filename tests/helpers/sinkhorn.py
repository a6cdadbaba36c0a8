"""Sinkhorn and Knopp's rounds as DINOv2 (arXiv 2304.07193) runs them, with the whole matrix."""

import torch


def sinkhorn(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """(views, K) logits of the whole batch -> probabilities of the prototypes, by view."""
    scores = (logits / temperature).exp()
    scores = scores / scores.sum()
    for _ in range(3):
        scores = scores / scores.sum(dim=0, keepdim=True) / scores.shape[1]
        scores = scores / scores.sum(dim=1, keepdim=True) / scores.shape[0]
    return scores * scores.shape[0]
