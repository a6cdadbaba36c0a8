"""A module of your own: nothing of sigray's is imported by this name."""

import torch

import sigray


def pair_loss(model: torch.nn.Module, batch: dict) -> torch.Tensor:
    """This rank's part of the sigmoid loss over all pairs of the global batch."""
    images = batch["images"].permute(0, 3, 1, 2).float() / 127.5 - 1
    image, text, scale, bias = model(images, batch["tokens"])
    return sigray.ring_sigmoid_loss(image, text, scale, bias)
