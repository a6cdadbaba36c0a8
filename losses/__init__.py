"""Contrastive losses as functions of tensors.

They know no config, logger or Ray; `sigray.native` is all of sigray that they import.
"""

from sigray.losses.distillation import Teacher, distillation_loss, distillation_loss_plain, sinkhorn_center
from sigray.losses.gradcache import cached_backward
from sigray.losses.gradients import all_reduce_gradients
from sigray.losses.logit_means import feature_means, mean_logits
from sigray.losses.negatives import Negatives
from sigray.losses.ring import NonFiniteFeatures, ring_sigmoid_loss, ring_softmax_loss
from sigray.losses.sharded import Slices, sharded_sigmoid_loss, sharded_softmax_loss
from sigray.losses.sigmoid import sigmoid_loss, sigmoid_loss_plain
from sigray.losses.softmax import softmax_loss_plain
from sigray.losses.tokens import token_loss, token_loss_plain

__all__ = [
    "Negatives",
    "NonFiniteFeatures",
    "Slices",
    "Teacher",
    "all_reduce_gradients",
    "cached_backward",
    "distillation_loss",
    "distillation_loss_plain",
    "feature_means",
    "mean_logits",
    "ring_sigmoid_loss",
    "ring_softmax_loss",
    "sharded_sigmoid_loss",
    "sharded_softmax_loss",
    "sigmoid_loss",
    "sigmoid_loss_plain",
    "sinkhorn_center",
    "softmax_loss_plain",
    "token_loss",
    "token_loss_plain",
]
