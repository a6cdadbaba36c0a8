"""Contrastive losses as functions of tensors. Knows no config, no logger, no Ray; imports nothing of sigray."""

from losses.exchange import NonFiniteFeatures, ring_sigmoid_loss
from losses.negatives import Negatives
from losses.sigmoid import sigmoid_loss, sigmoid_loss_plain

__all__ = ["Negatives", "NonFiniteFeatures", "ring_sigmoid_loss", "sigmoid_loss", "sigmoid_loss_plain"]
