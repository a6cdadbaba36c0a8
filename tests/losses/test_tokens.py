"""The token loss in chunks against the equation with all logits: value and every gradient."""

import pytest
import torch

from sigray.losses import token_loss, token_loss_plain


def inputs(dtype, *, vocabulary=11):
    generator = torch.Generator().manual_seed(0)
    shapes = {"hidden": (3, 5, 8), "weight": (vocabulary, 8), "bias": (vocabulary,)}
    tensors = [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes.values()]
    targets = torch.randint(0, vocabulary, (3, 5), generator=generator, dtype=torch.int32)
    position_weights = torch.rand(3, 5, generator=generator, dtype=dtype)
    position_weights[0, 0] = position_weights[2, 3:] = 0
    return tensors, targets, position_weights


@pytest.mark.parametrize("chunk_size", [None, 1, 2, 3, 5, 100])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-6)])
def test_equals_the_equation(chunk_size, dtype, tolerance):
    tensors, targets, position_weights = inputs(dtype)
    doubled = [tensor.detach().double().requires_grad_() for tensor in tensors]
    loss = 2.5 * token_loss(*tensors, targets, position_weights, chunk_size=chunk_size)
    expected = 2.5 * token_loss_plain(*doubled, targets, position_weights.double())
    assert loss.item() == pytest.approx(expected.item(), rel=tolerance)
    found, wanted = torch.autograd.grad(loss, tensors), torch.autograd.grad(expected, doubled)
    for gradient, want in zip(found, wanted, strict=True):
        assert (gradient - want).abs().max() <= tolerance * want.abs().max()


def test_the_logits_of_one_chunk_are_held():
    """A chunk holds as many positions as fit into a tile, at least one of each row."""
    largest = []

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            output = func(*args, **(kwargs or {}))
            largest.append(max((each.numel() for each in [output] if isinstance(each, torch.Tensor)), default=0))
            return output

    vocabulary, width = 2**16, 2
    hidden = torch.zeros(1, 200, width, requires_grad=True)
    weight = torch.zeros(vocabulary, width, requires_grad=True)
    bias = torch.zeros(vocabulary, requires_grad=True)
    with Largest():
        token_loss(hidden, weight, bias, torch.zeros(1, 200, dtype=torch.int32), torch.ones(1, 200)).backward()
    assert max(largest) == 2048**2  # 64 of the 200 positions


def test_products_are_of_the_dtype_of_hidden():
    (hidden, weight, bias), targets, position_weights = inputs(torch.float32)
    hidden = hidden.detach().bfloat16().requires_grad_()
    loss = token_loss(hidden, weight, bias, targets, position_weights)
    loss.backward()
    assert (loss.dtype, hidden.grad.dtype, weight.grad.dtype) == (torch.float32, torch.bfloat16, torch.float32)
    expected = token_loss_plain(hidden.double(), weight.double(), bias.double(), targets, position_weights.double())
    assert loss.item() == pytest.approx(expected.item(), rel=2e-2)


def test_no_position_gives_zero_and_no_gradient():
    hidden, weight, bias = (torch.randn(shape, requires_grad=True) for shape in ((1, 0, 4), (9, 4), (9,)))
    loss = token_loss(hidden, weight, bias, torch.zeros(1, 0, dtype=torch.int32), torch.zeros(1, 0))
    loss.backward()
    assert loss == 0
    assert hidden.grad.shape == (1, 0, 4)
    assert not weight.grad.any()
    assert not bias.grad.any()


def test_a_second_backward_pass_is_refused():
    tensors, targets, position_weights = inputs(torch.float32)
    loss = token_loss(*tensors, targets, position_weights)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second backward pass"):
        loss.backward()
