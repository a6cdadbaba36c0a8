"""Bottlenecked token embedding of mSigLIP (arXiv 2303.15343, section 4.6).

    N  vocabulary      K  bottleneck      W  width of the text tower

An N x K table, then a K x W product. A multilingual vocabulary of 250,000 tokens at width 768 is 192 M parameters,
more than the rest of the tower; through K = 96 it is 24 M.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

EMBEDDING = "text.token_embedding"
_STD = 0.02  # of open_clip's token embedding: the tower starts with inputs of the usual size


class BottleneckEmbedding(nn.Module):
    """Replaces an `nn.Embedding(N, W)`.

    Attributes:
        table: N x K.
        expand: K x W, without a bias: the product of both is one table again.
    """

    def __init__(self, num_tokens: int, bottleneck: int, width: int) -> None:
        super().__init__()
        self.table = nn.Embedding(num_tokens, bottleneck)
        self.expand = nn.Linear(bottleneck, width, bias=False)
        nn.init.normal_(self.table.weight, std=_STD)
        nn.init.normal_(self.expand.weight, std=bottleneck**-0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        """(b, T) ints -> (b, T, W)."""
        return self.expand(self.table(tokens))

    def folded(self) -> Tensor:
        """(N, W): the product as one table, rounded once."""
        table, expand = self.table.weight.detach(), self.expand.weight.detach()
        return (table.double() @ expand.double().T).to(table.dtype)


def use_bottleneck(module: nn.Module, bottleneck: int) -> None:
    """Replace the token embedding of a model's text tower.

    Raises:
        ValueError: if the tower's embedding is not of open_clip's type, or no wider than the bottleneck.
    """
    text = module.get_submodule("text")
    embedding = getattr(text, "token_embedding", None)
    if not isinstance(embedding, nn.Embedding):
        raise ValueError(f"model.token_bottleneck={bottleneck} needs open_clip's own text tower, without hf_model_name")
    if bottleneck >= embedding.embedding_dim:
        raise ValueError(
            f"model.token_bottleneck={bottleneck} is no bottleneck: the text tower's width is {embedding.embedding_dim}"
        )
    with torch.device(embedding.weight.device):
        text.token_embedding = BottleneckEmbedding(embedding.num_embeddings, bottleneck, embedding.embedding_dim)


def fold_bottleneck(module: nn.Module) -> dict[str, Tensor]:
    """The weights by open_clip's names, a bottleneck folded into one table."""
    weights = dict(module.state_dict())
    embedding = getattr(module.get_submodule("text"), "token_embedding", None)
    if isinstance(embedding, BottleneckEmbedding):
        weights = {name: value for name, value in weights.items() if not name.startswith(f"{EMBEDDING}.")}
        weights[f"{EMBEDDING}.weight"] = embedding.folded()
    return weights
