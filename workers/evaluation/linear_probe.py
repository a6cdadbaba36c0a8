"""Linear probe: a linear classifier on frozen image features.

    n  images to fit on      m  held-out images      D  embedding dimension      C  classes of the fit images

As arXiv 2103.00020, appendix A: multinomial logistic regression on all features at once, by L-BFGS in float64. The
problem is convex with one solution, so there is no learning rate and no seed. Every tenth image of those to fit on
chooses the L2 penalty.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sigray.workers.data.tar import DataError

PENALTIES = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
_MAX_ITERATIONS = 500
_TOLERANCE = 1e-7  # largest entry of the gradient of the mean loss
_HELD_BACK = 10  # every tenth image chooses the penalty


def linear_probe(
    fit_features: Tensor, fit_ids: Sequence[str], features: Tensor, class_ids: Sequence[str]
) -> dict[str, float]:
    """Fit on some images, measure on others.

    Args:
        fit_features, features: (n, D) and (m, D), of unit norm.
        fit_ids, class_ids: n and m class ids; an image whose class is not among those to fit on counts as wrong.

    Returns:
        top1, chance1 (of the classes to fit on), num_classes, num_fit, num_images, num_unknown (images of classes that
        are not among those to fit on), penalty.

    Raises:
        DataError: for fewer than two classes to fit on.
    """
    numbers = {class_id: number for number, class_id in enumerate(sorted(set(fit_ids)))}
    if len(numbers) < 2:
        raise DataError(f"a linear probe needs two classes to fit on, and there are {len(numbers)}")
    fit, queries = fit_features.double(), features.double()
    mean = fit.mean(dim=0)
    spread = (fit - mean).pow(2).mean().sqrt()  # one number: directions keep their weight
    fit, queries = (fit - mean) / spread, (queries - mean) / spread
    labels = torch.tensor([numbers[class_id] for class_id in fit_ids])
    truth = torch.tensor([numbers.get(class_id, -1) for class_id in class_ids])
    penalty = _choose_penalty(fit, labels, len(numbers))
    weights = fit_logistic(fit, labels, len(numbers), penalty)
    return {
        "top1": float((_logits(queries, weights).argmax(dim=1) == truth).double().mean()),
        "chance1": 1 / len(numbers),
        "num_classes": len(numbers),
        "num_fit": len(labels),
        "num_images": len(truth),
        "num_unknown": int((truth < 0).sum()),
        "penalty": penalty,
    }


def fit_logistic(
    features: Tensor, labels: Tensor, num_classes: int, penalty: float, start: Tensor | None = None
) -> Tensor:
    """(C, D + 1) float64 weights, the last column the bias.

    They minimise mean cross-entropy + penalty / 2 * |weights|^2. The bias has no penalty.
    """
    weights = torch.zeros(num_classes, features.shape[1] + 1, dtype=torch.float64) if start is None else start.clone()
    weights.requires_grad_(True)
    optimizer = torch.optim.LBFGS(
        [weights], max_iter=_MAX_ITERATIONS, tolerance_grad=_TOLERANCE, tolerance_change=0, history_size=10,
        line_search_fn="strong_wolfe",
    )  # fmt: skip

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(_logits(features, weights), labels)
        loss = loss + penalty / 2 * weights[:, :-1].square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return weights.detach()


def _choose_penalty(features: Tensor, labels: Tensor, num_classes: int) -> float:
    """The penalty with the most hits on the images held back.

    Of equal penalties the larger one wins; for few images, the middle one is taken.
    """
    is_held_back = torch.arange(len(labels)) % _HELD_BACK == 0
    if len(labels) < 2 * _HELD_BACK:
        return PENALTIES[len(PENALTIES) // 2]
    best: tuple[int, float] = (-1, PENALTIES[0])
    weights: Any = None
    for penalty in PENALTIES:
        weights = fit_logistic(features[~is_held_back], labels[~is_held_back], num_classes, penalty, weights)
        hits = int((_logits(features[is_held_back], weights).argmax(dim=1) == labels[is_held_back]).sum())
        best = max(best, (hits, penalty))
    return best[1]


def _logits(features: Tensor, weights: Tensor) -> Tensor:
    return features @ weights[:, :-1].T + weights[:, -1]
