"""Contrastive losses as functions of tensors. Knows no config, no logger, no Ray; imports nothing of sigray."""

from losses.exchange import ring_sigmoid_loss
from losses.sigmoid import sigmoid_loss, sigmoid_loss_plain

__all__ = ["ring_sigmoid_loss", "sigmoid_loss", "sigmoid_loss_plain"]
