"""Heads, mask token and views for self-distillation, as in SigLIP 2.

    b  images      L  local views of each      P  patches      W  width of the image tower      K  prototypes

The local-to-global term is that of SILC (arXiv 2310.13355), the masked one that of TIPS (arXiv 2410.16512). SigLIP 2
(arXiv 2502.14786, section 2.2) names both and prints no sizes: those of the heads are DINO's (arXiv 2104.14294).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from sigray.workers.config import HeadsConfig


class PrototypeHead(nn.Module):
    """An MLP of three layers, a norm, and prototypes; as DINO's head.

    Args:
        width: of the features.
    """

    def __init__(self, width: int, config: HeadsConfig) -> None:
        super().__init__()
        first = nn.Linear(width, config.hidden)
        second = nn.Linear(config.hidden, config.hidden)
        last = nn.Linear(config.hidden, config.bottleneck)
        self.mlp = nn.Sequential(first, nn.GELU(), second, nn.GELU(), last)
        self.prototypes = nn.Parameter(torch.empty(config.prototypes, config.bottleneck))
        for layer in (first, second, last):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
        nn.init.normal_(self.prototypes)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """(..., width) -> states (..., bottleneck) and prototypes (K, bottleneck).

        Rows of both have unit norm: their products are the logits.
        """
        return normalize(self.mlp(features), dim=-1), normalize(self.prototypes, dim=-1)


class Distiller(nn.Module):
    """What the terms need beside the image tower.

    Args:
        embed_dim: of the image tower's features.
        width: W.

    Attributes:
        local_center, masked_center: (K,), averages of the teacher's logits.
    """

    local_center: Tensor
    masked_center: Tensor

    def __init__(self, config: HeadsConfig, embed_dim: int, width: int) -> None:
        super().__init__()
        self.local_head = PrototypeHead(embed_dim, config)
        self.masked_head = PrototypeHead(width, config)
        self.mask_token = nn.Parameter(torch.zeros(width))
        nn.init.normal_(self.mask_token, std=0.02)
        self.register_buffer("local_center", torch.zeros(config.prototypes))
        self.register_buffer("masked_center", torch.zeros(config.prototypes))

    def reset_centers(self, is_fresh: Callable[[str], bool]) -> None:
        """Zero the center of each head whose logits are others now.

        Args:
            is_fresh: whether a parameter of this module, by name, starts fresh.
        """
        for head in ("local", "masked"):
            names = [name for name, _ in self.named_parameters() if name.startswith(f"{head}_head.")]
            if any(map(is_fresh, names)):
                self.get_buffer(f"{head}_center").zero_()


class ViewEncoder(nn.Module):
    """Image tower and heads on views of another size, or with masked patches.

    Attributes:
        visual: a ViT of timm without class token, such as SigLIP's.
        distiller: of the same model.
    """

    def __init__(self, visual: nn.Module, distiller: nn.Module) -> None:
        super().__init__()
        self.visual = visual
        self.distiller = distiller
        self._resize: dict[int, Tensor] = {}  # by edge of a view in patches: (patches there, P)

    def forward(
        self, pixels: Tensor, masked: Tensor | None = None, *, pools: bool, reads: Tensor | None = None
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """States and prototypes by head.

        Args:
            pixels: (n, 3, s, s), s a multiple of the patch size.
            masked: (n, P) bool; these patches become the mask token.
            pools: whether `local` is computed, from the pooled features.
            reads: (n, m) patches for which `masked` is computed; None: none.
        """
        tower: Any = self.visual
        trunk = tower.trunk
        grid = trunk.patch_embed.proj(pixels)
        tokens = trunk.patch_embed.norm(grid.flatten(2).transpose(1, 2))
        if masked is not None:
            token: Any = self.distiller.get_parameter("mask_token")
            tokens = torch.where(masked[:, :, None], token.to(tokens.dtype), tokens)
        tokens = trunk.norm_pre(trunk.pos_drop(tokens + self._positions(trunk, grid.shape[-1])))
        for block in trunk.blocks:
            tokens = block(tokens)
        tokens = trunk.norm(tokens)
        found = {}
        if pools:
            found["local"] = self.distiller.get_submodule("local_head")(tower.head(trunk.forward_head(tokens)))
        if reads is not None:
            chosen = tokens.gather(1, reads[:, :, None].expand(-1, -1, tokens.shape[2]))
            found["masked"] = self.distiller.get_submodule("masked_head")(chosen)
        return found

    def _positions(self, trunk: Any, edge: int) -> Tensor:
        """(1, edge^2, W) position embeddings, resized as timm does.

        The resize is linear, so that it is one product on every device.
        """
        embeddings: Tensor = trunk.pos_embed
        own = trunk.patch_embed.grid_size[0]
        if edge == own:
            return embeddings
        if edge not in self._resize:
            from timm.layers import resample_abs_pos_embed

            each = torch.eye(own * own, device="cpu")[None]
            matrix = resample_abs_pos_embed(each, [edge, edge], [own, own], num_prefix_tokens=0)[0]
            self._resize[edge] = matrix.to(embeddings.device, embeddings.dtype)
        return self._resize[edge] @ embeddings


def build_distiller(config: HeadsConfig, visual: Any, embed_dim: int) -> Distiller:
    """Return fresh heads for an image tower.

    Raises:
        ValueError: if it is no ViT of timm without class token.
    """
    from timm.models.vision_transformer import VisionTransformer

    trunk: Any = getattr(visual, "trunk", visual)
    is_vit = isinstance(trunk, VisionTransformer) and isinstance(trunk.patch_embed.proj, nn.Conv2d)
    if not is_vit or trunk.num_prefix_tokens or trunk.pos_embed is None:
        raise ValueError(
            "model.heads: self-distillation needs a ViT of timm without class token, as SigLIP's, and the image tower "
            f"({type(trunk).__name__}) is none: take such a tower, or leave model.heads out"
        )
    return Distiller(config, embed_dim, trunk.embed_dim)
