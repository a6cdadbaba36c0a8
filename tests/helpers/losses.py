"""What the tests of several losses share: leaves, gradients, tiles of logits, a twin that sorts."""

import torch


def value_and_gradients(function, *inputs):
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    value = function(*leaves)
    return [value.detach(), *torch.autograd.grad(value, leaves)]


def scalars(scale, bias, dtype=torch.float64):
    return torch.tensor(scale, dtype=dtype), torch.tensor(bias, dtype=dtype)


def sorted_twin(image, text, scale, bias, positive_offset, negatives):
    """All logits at once; the hardest are those of the largest cosines."""
    cosines = image @ text.T
    rows, columns = torch.meshgrid(torch.arange(len(image)), torch.arange(len(text)), indexing="ij")
    is_pair = columns == rows + positive_offset
    order = cosines.detach()[~is_pair].float().sort(descending=negatives.keep == "hardest").values
    limit = order[max(1, round(negatives.fraction * len(order))) - 1] if len(order) else 0
    seen = cosines.detach().float()
    kept = is_pair | (seen >= limit if negatives.keep == "hardest" else seen <= limit)
    z = scale * cosines + bias
    return torch.nn.functional.softplus(torch.where(is_pair, -z, z))[kept].sum() / len(image)


def tile_of(rows, columns, dtype, seed, excluded=0.0):
    generator = torch.Generator().manual_seed(seed)
    x = (2 * torch.rand(rows, columns, generator=generator) - 1).to(dtype)
    return x.masked_fill_(torch.rand(rows, columns, generator=generator) < excluded, -torch.inf)
