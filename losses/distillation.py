"""Self-distillation: the cross entropy of a student's prototypes with a teacher's.

    G  images      N  views or patches of each      D  width of a state      K  prototypes

    s_gnk  student_gn . table_k / student_temperature
    p_gnk  softmax_k of (teacher_gn . teacher_table_k - center_k) / teacher_temperature
    L      sum_gn sum_k -p_gnk log softmax_k s_gn, divided by G N

The equation is that of DINO (arXiv 2104.14294) and, between patches, of iBOT (arXiv 2111.07832). As in
`losses/tokens.py`, one pass over chunks of N gives the value and the gradients. It keeps the logits of one chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sigray.losses.sigmoid import OnePass
from sigray.losses.spans import span
from sigray.losses.tiles import accumulate, default_tile_size, positions_per_tile, product_dtype, ranges, sum_dtype


@dataclass(frozen=True)
class Teacher:
    """What a student is to predict.

    Attributes:
        states: (G, N, D) of unit norm, or (G, 1, D) for all N.
        table: (K, D), rows of unit norm.
        center: (K,), subtracted from the logits.
        temperature: of the teacher's softmax.
    """

    states: Tensor
    table: Tensor
    center: Tensor
    temperature: float

    def probabilities(self, columns: slice) -> Tensor:
        """(G n, K), or (G, 1, K) if all N have the same, in the dtype of sums."""
        sums, products = sum_dtype(self.states), product_dtype(self.states)
        is_shared = self.states.shape[1] == 1
        states = self.states if is_shared else self.states[:, columns].flatten(0, 1)
        logits = (states.to(products) @ self.table.to(products).T).to(sums)
        return logits.sub_(self.center).div_(self.temperature).softmax(dim=-1)


def sinkhorn_center(
    states: Sequence[Tensor],
    table: Tensor,
    temperature: float,
    average: Callable[[Tensor], Tensor],
    *,
    num_rounds: int = 3,
    chunk_size: int | None = None,
) -> Tensor:
    """The center that gives each prototype an equal share of the batch.

    Sinkhorn and Knopp's rounds, as DINOv2 (arXiv 2304.07193) has them after SwAV (arXiv 2006.09882). A round scales the
    probabilities to equal sums of each prototype, and then to 1 for each view. The scales of the prototypes are a
    center, and the last step is the teacher's softmax. So nothing of size views x prototypes is kept.

    Args:
        states: of all views of this rank's batch, each (G, N, D) of unit norm.
        table: (K, D), rows of unit norm.
        temperature: of the teacher's softmax.
        average: the mean over ranks.
        chunk_size: as in `token_loss`.

    Returns:
        (K,), to be subtracted from the logits; the same on every rank.
    """
    sums, products = sum_dtype(table), product_dtype(table)
    table = table.to(products)
    center = torch.zeros(len(table), dtype=sums, device=table.device)
    for number in range(num_rounds):
        total = torch.full_like(center, -torch.inf)
        for each in states:
            size = chunk_size or positions_per_tile(default_tile_size(each.device), each.shape[0], len(table))
            for columns in ranges(each.shape[1], size):
                flat = each[:, columns].flatten(0, 1).to(products)
                logits = (flat @ table.T).to(sums).div_(temperature)
                if number:  # to 1 for each view
                    logits -= (logits - center / temperature).logsumexp(dim=1, keepdim=True)
                total = torch.logaddexp(total, logits.logsumexp(dim=0))
        # In float64, which holds e^(2 / temperature).
        center = average(total.double().exp()).log().to(sums) * temperature
    return center


def distillation_loss_plain(student: Tensor, table: Tensor, teacher: Teacher, temperature: float) -> Tensor:
    """The equation with all of its logits; as `distillation_loss`.

    For reading and for tests.
    """
    logits = (teacher.states @ teacher.table.T - teacher.center) / teacher.temperature
    found = torch.log_softmax(student @ table.T / temperature, dim=-1)
    return -(torch.softmax(logits, dim=-1) * found).sum(dim=-1).mean()


def distillation_loss(
    student: Tensor, table: Tensor, teacher: Teacher, temperature: float, *, chunk_size: int | None = None
) -> Tensor:
    """The mean over (G, N) of the cross entropy with the teacher.

    It is differentiable once in the first two arguments.

    Args:
        student: (G, N, D) of unit norm, any floating dtype, which is that of the products.
        table: (K, D), rows of unit norm.
        temperature: of the student's softmax.
        chunk_size: as in `token_loss`.

    Returns:
        Scalar, float64 for float64 inputs, else float32.

    Raises:
        RuntimeError: as `sigmoid_loss`.
    """
    chunk_size = chunk_size or positions_per_tile(default_tile_size(student.device), student.shape[0], len(table))

    def compute(student: Tensor, table: Tensor) -> DistillationResult:
        with span("loss: distillation"):
            return _one_pass(student, table, teacher, temperature, chunk_size)

    return OnePass.apply(compute, student, table)


@dataclass
class DistillationResult:
    """The loss, and its gradients."""

    loss: Tensor  # scalar
    grad_student: Tensor  # (G, N, D)
    grad_table: Tensor  # (K, D)

    def gradients(self, grad_loss: Tensor) -> tuple[Tensor, ...]:
        """Gradients of student and table; to be taken once."""
        return self.grad_student.mul_(grad_loss), self.grad_table.mul_(grad_loss)


def _one_pass(
    student: Tensor, table: Tensor, teacher: Teacher, temperature: float, chunk_size: int
) -> DistillationResult:
    sums = sum_dtype(student)
    products = product_dtype(student)
    num_terms = student.shape[0] * student.shape[1]
    table = table.to(products)
    grad_table = torch.zeros_like(table, dtype=sums)
    loss = grad_table.new_zeros(())
    parts = []
    is_shared = teacher.states.shape[1] == 1
    shared = teacher.probabilities(slice(0, 1)) if is_shared else None

    def visit(columns: slice) -> Tensor:  # a function, so that a chunk is freed before the next
        states = student[:, columns].to(products)
        flat = states.flatten(0, 1)
        wanted = teacher.probabilities(columns) if shared is None else shared.expand(-1, states.shape[1], -1)
        wanted = wanted.reshape(len(flat), -1)
        logits = (flat @ table.T).to(sums).div_(temperature)
        logits = logits.sub_(logits.logsumexp(dim=1, keepdim=True))
        value = (wanted * logits).sum()
        slope = logits.exp_().sub_(wanted).div_(temperature * num_terms).to(products)  # dL/d(student . table)
        parts.append((slope @ table).view_as(states).to(sums))
        accumulate(grad_table, slope.T, flat)
        return value

    for columns in ranges(student.shape[1], chunk_size):
        loss = loss - visit(columns)
    return DistillationResult(loss / num_terms, torch.cat(parts, dim=1), grad_table)
