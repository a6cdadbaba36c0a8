"""Contrastive losses as functions of tensors. Knows no config, no logger, no Ray; imports nothing of sigray."""

from losses.exchange import NonFiniteFeatures, ring_sigmoid_loss, ring_softmax_loss
from losses.gradcache import cached_backward
from losses.negatives import Negatives
from losses.sigmoid import sigmoid_loss, sigmoid_loss_plain
from losses.softmax import softmax_loss_plain

__all__ = [
    "Negatives",
    "NonFiniteFeatures",
    "cached_backward",
    "ring_sigmoid_loss",
    "ring_softmax_loss",
    "sigmoid_loss",
    "sigmoid_loss_plain",
    "softmax_loss_plain",
]
