"""Inputs and twins of the losses over split features."""

import torch

from sigray.losses import sharded_sigmoid_loss, sharded_softmax_loss, sigmoid_loss_plain
from sigray.losses.softmax import softmax_loss_plain
from tests.helpers.reference import random_features

DIM = 5
PLAIN = {
    "sigmoid": sigmoid_loss_plain,
    "softmax": lambda image, text, scale, bias: softmax_loss_plain(image, text, scale) + 0 * bias,
}
SHARDED = {"sigmoid": sharded_sigmoid_loss, "softmax": sharded_softmax_loss}


def inputs(num_pairs, dtype=torch.float64, dim=DIM):
    features = [random_features(num_pairs, dim, seed=seed, dtype=dtype) for seed in (0, 1)]
    scalar = torch.float64 if dtype == torch.float64 else torch.float32
    return [*features, torch.tensor(10.0, dtype=scalar), torch.tensor(-8.0, dtype=scalar)]
