"""The distillation loss in chunks against DINO's equation with all logits: value and every gradient."""

import dataclasses

import pytest
import torch
from torch.nn.functional import normalize

from sigray.losses import Teacher, distillation_loss, distillation_loss_plain, sinkhorn_center
from tests.helpers.sinkhorn import sinkhorn

STUDENT_TEMPERATURE, TEACHER_TEMPERATURE = 0.1, 0.04


def inputs(dtype, *, is_shared):
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    student, table = normalize(drawn(3, 5, 8), dim=-1), normalize(drawn(11, 8), dim=-1)
    states, teacher_table = normalize(drawn(3, 1 if is_shared else 5, 8), dim=-1), normalize(drawn(11, 8), dim=-1)
    tensors = [each.to(dtype).requires_grad_() for each in (student, table)]
    wanted = [each.to(dtype) for each in (states, teacher_table, 0.3 * drawn(11))]
    return tensors, Teacher(*wanted, TEACHER_TEMPERATURE)


@pytest.mark.parametrize("is_shared", [True, False])
@pytest.mark.parametrize("chunk_size", [None, 1, 2, 100])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 5e-6)])
def test_equals_the_equation(is_shared, chunk_size, dtype, tolerance):
    tensors, teacher = inputs(dtype, is_shared=is_shared)
    doubled = [tensor.detach().double().requires_grad_() for tensor in tensors]
    doubles = (each.double() for each in (teacher.states, teacher.table, teacher.center))
    loss = 2.5 * distillation_loss(*tensors, teacher, STUDENT_TEMPERATURE, chunk_size=chunk_size)
    expected = 2.5 * distillation_loss_plain(*doubled, Teacher(*doubles, TEACHER_TEMPERATURE), STUDENT_TEMPERATURE)
    assert loss.item() == pytest.approx(expected.item(), rel=tolerance)
    found, wanted = torch.autograd.grad(loss, tensors), torch.autograd.grad(expected, doubled)
    for gradient, want in zip(found, wanted, strict=True):
        # Float32: temperatures multiply the rounding of the logits by 10 and 25.
        assert (gradient - want).abs().max() <= tolerance * want.abs().max()


def test_the_plain_equation_is_dinos():
    """View by view, as `DINOLoss.forward` adds them up, the large crop of the student left out."""
    (student, table), teacher = inputs(torch.float64, is_shared=True)
    logits = (teacher.states[:, 0] @ teacher.table.T - teacher.center) / TEACHER_TEMPERATURE
    wanted = logits.exp() / logits.exp().sum(dim=1, keepdim=True)
    total = torch.zeros((), dtype=torch.float64)
    for view in range(student.shape[1]):
        found = (student[:, view] @ table.T / STUDENT_TEMPERATURE).exp()
        found = found / found.sum(dim=1, keepdim=True)
        total = total - (wanted * found.log()).sum(dim=1).mean() / student.shape[1]
    assert distillation_loss_plain(student, table, teacher, STUDENT_TEMPERATURE).item() == pytest.approx(total.item())


@pytest.mark.parametrize("chunk_size", [None, 1, 2, 100])
@pytest.mark.parametrize(
    ("dtype", "temperature", "tolerance"),
    [(torch.float64, 0.04, 1e-12), (torch.float32, 0.04, 2e-5), (torch.float32, 0.005, 1e-3)],
)
def test_the_center_of_sinkhorn_gives_the_targets_of_the_whole_matrix(chunk_size, dtype, temperature, tolerance):
    generator = torch.Generator().manual_seed(1)
    states = normalize(torch.randn(7, 5, 8, generator=generator, dtype=torch.float64), dim=-1)
    table = normalize(torch.randn(11, 8, generator=generator, dtype=torch.float64), dim=-1)
    parts = [part.to(dtype) for part in states.split([3, 1, 3])]
    found = sinkhorn_center(parts, table.to(dtype), temperature, lambda mean: mean, chunk_size=chunk_size)
    assert found.dtype == dtype
    logits = (states @ table.T).flatten(0, 1)
    targets = ((logits - found.double()) / temperature).softmax(dim=-1)
    assert (targets - sinkhorn(logits, temperature)).abs().max() < tolerance
    # Each prototype has its share, up to what three rounds leave.
    even = (logits / temperature).softmax(dim=-1).mean(dim=0)
    assert (targets.mean(dim=0) - 1 / 11).abs().max() < 0.5 * (even - 1 / 11).abs().max()


def test_the_teacher_gets_no_gradient():
    tensors, teacher = inputs(torch.float32, is_shared=True)
    teacher = dataclasses.replace(teacher, states=teacher.states.requires_grad_())
    distillation_loss(*tensors, teacher, STUDENT_TEMPERATURE).backward()
    assert teacher.states.grad is None
