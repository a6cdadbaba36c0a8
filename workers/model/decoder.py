"""The captioning decoder of SigLIP 2 (arXiv 2502.14786, section 2.1).

    b  captions        P  image tokens        W, V  width and vocabulary        T  context length

It is that of LocCa without boxes: it predicts each token of a caption from the image tower's features before pooling.
It reads either the tokens before (autoregressive), or [MASK] in every place (parallel prediction of CapPa, arXiv
2306.07915). The architecture and the initial weights are those of big_vision's `models/proj/cappa/cappa.py`. The
features of images and texts do without it; evaluations let it write captions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention

from sigray.losses import token_loss
from sigray.workers.config import DecoderConfig, ModelConfig
from sigray.workers.model.inputs import shapes, tower_config
from sigray.workers.model.tokenizer import CaptionEnds

_EPSILON = 1e-6  # of flax's LayerNorm

KeysAndValues = tuple[Tensor, Tensor]
"""Of the L sources of an attention, each (b, heads, L, W / heads)."""


class Decoder(nn.Module):
    """Blocks of causal self-attention, cross-attention and an MLP; then logits.

    Args:
        layers, width, heads: of the blocks.
        mlp_width: of their MLPs.
        image_width: of the image tower's features.
        vocab_size: V; token V is [MASK].
        context_length: T.
        has_bias: whether norms and MLPs of the blocks have biases; attention has none.
    """

    def __init__(
        self,
        *,
        layers: int,
        width: int,
        heads: int,
        mlp_width: int,
        image_width: int,
        vocab_size: int,
        context_length: int,
        has_bias: bool,
    ) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(vocab_size + 1, width)
        self.positional_embedding = nn.Parameter(torch.empty(context_length, width))
        blocks = [Block(width, heads, mlp_width, image_width, has_bias=has_bias) for _ in range(layers)]
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(width, eps=_EPSILON)
        self.head = nn.Linear(width, vocab_size)
        nn.init.normal_(self.token_embedding.weight)
        nn.init.normal_(self.positional_embedding, std=width**-0.5)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(
        self,
        image_tokens: Tensor,
        tokens: Tensor,
        is_parallel: Tensor,
        position_weights: Tensor,
        pad: int,
        places: Tensor | None = None,
        loss: Callable[..., Tensor] = token_loss,
    ) -> Tensor:
        """The loss of some captions: a weighted sum over their positions.

        Args:
            image_tokens: (b, P, image_width).
            tokens: (b, T) ints.
            is_parallel: (b,) bool, whether a caption is read as [MASK] everywhere.
            position_weights: (b, T), 0 for a position that does not count.
            pad: the token that stands before the first one.
            places: of the positions that count, in the flattened (b, T); None: all are computed.
            loss: `token_loss`, or what stands for it in a plan.
        """
        before = torch.nn.functional.pad(tokens[:, :-1], (1, 0), value=pad)
        mask_token = torch.full_like(before, self.head.out_features)
        causal = torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool, device=tokens.device).tril()
        states = self.read(
            image_tokens,
            torch.where(is_parallel[:, None], mask_token, before),
            (is_parallel[:, None, None] | causal)[:, None],
        )
        if places is None:
            targets = tokens
        else:
            states, targets, position_weights = (
                each.flatten(0, 1)[places][None] for each in (states, tokens, position_weights)
            )
        kind = states.device.type
        if torch.is_autocast_enabled(kind):
            states = states.to(torch.get_autocast_dtype(kind))
        with torch.autocast(kind, enabled=False):
            return loss(states, self.head.weight, self.head.bias, targets, position_weights)

    def read(self, image_tokens: Tensor, inputs: Tensor, may_see: Tensor) -> Tensor:
        """(b, T, W) states before the head.

        Args:
            inputs: (b, T) tokens that are read.
            may_see: (b or 1, 1, T, T) bool, which positions each position attends to.
        """
        states = self.token_embedding(inputs) + self.positional_embedding[: inputs.shape[1]]
        for block in self.blocks:
            states = block(states, image_tokens, may_see)
        return self.norm(states)

    def generate(self, image_tokens: Tensor, ends: CaptionEnds) -> Tensor:
        """Caption images token by token, each the most likely one after those before.

        Args:
            image_tokens: (n, P, image_width).

        Returns:
            (n, T) int32, filled with pads after the end of each caption.
        """
        context_length = len(self.positional_embedding)
        captions = torch.full((len(image_tokens), context_length), ends.pad, device=image_tokens.device)
        last = captions[:, 0]
        has_ended = torch.zeros_like(last, dtype=torch.bool)
        blocks: list[Any] = list(self.blocks)
        seen = [block.cross_attention.keys_and_values(image_tokens) for block in blocks]
        past: list[KeysAndValues | None] = [None] * len(blocks)
        for place in range(context_length):
            states = (self.token_embedding(last) + self.positional_embedding[place])[:, None]
            for number, block in enumerate(blocks):
                states, past[number] = block.step(states, past[number], seen[number])
            likeliest = self.head(self.norm(states))[:, 0].argmax(dim=1)
            last = torch.where(has_ended, ends.pad, likeliest)
            captions[:, place] = last
            has_ended |= last == ends.end
            if has_ended.all():
                break
        return captions.int()

    def sizes(self) -> DecoderConfig:
        """Return the config of a decoder of these sizes, whatever the text tower."""
        block: Any = self.blocks[0]
        return DecoderConfig(
            layers=len(self.blocks),
            width=self.head.in_features,
            heads=block.self_attention.heads,
            bias=block.mlp_in.bias is not None,
        )


class Block(nn.Module):
    """Self-attention, cross-attention and MLP, each after a norm and added."""

    def __init__(self, width: int, heads: int, mlp_width: int, image_width: int, *, has_bias: bool) -> None:
        super().__init__()
        self.norm_1, self.norm_2, self.norm_3 = (nn.LayerNorm(width, eps=_EPSILON, bias=has_bias) for _ in range(3))
        self.self_attention = Attention(width, heads, width)
        self.cross_attention = Attention(width, heads, image_width)
        self.mlp_in = nn.Linear(width, mlp_width, bias=has_bias)
        self.mlp_out = nn.Linear(mlp_width, width, bias=has_bias)
        for layer in (self.mlp_in, self.mlp_out):
            nn.init.xavier_uniform_(layer.weight)
            if has_bias:
                nn.init.normal_(layer.bias, std=1e-6)

    def forward(self, states: Tensor, image_tokens: Tensor, may_see: Tensor) -> Tensor:
        normed = self.norm_1(states)
        states = states + self.self_attention(normed, normed, may_see)
        return self._add_image(states, self.cross_attention.keys_and_values(image_tokens))

    def step(self, states: Tensor, past: KeysAndValues | None, seen: KeysAndValues) -> tuple[Tensor, KeysAndValues]:
        """One position after others.

        Args:
            states: (b, 1, W) of the position.
            past: of self-attention, of the positions before; None before the first.
            seen: of cross-attention.

        Returns:
            (b, 1, W), and `past` with this position.
        """
        normed = self.norm_1(states)
        own = self.self_attention.keys_and_values(normed)
        if past is not None:
            own = torch.cat([past[0], own[0]], dim=2), torch.cat([past[1], own[1]], dim=2)
        states = states + self.self_attention.attend(normed, own)
        return self._add_image(states, seen), own

    def _add_image(self, states: Tensor, seen: KeysAndValues) -> Tensor:
        states = states + self.cross_attention.attend(self.norm_2(states), seen)
        return states + self.mlp_out(gelu(self.mlp_in(self.norm_3(states)), approximate="tanh"))


class Attention(nn.Module):
    """Attention of (b, T, W) queries to (b, L, source_width) sources, without biases."""

    def __init__(self, width: int, heads: int, source_width: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.out = (nn.Linear(width, width, bias=False) for _ in range(2))
        self.key, self.value = (nn.Linear(source_width, width, bias=False) for _ in range(2))
        for layer in (self.query, self.key, self.value, self.out):
            nn.init.normal_(layer.weight, std=layer.in_features**-0.5)

    def forward(self, queries: Tensor, sources: Tensor, may_see: Tensor) -> Tensor:
        return self.attend(queries, self.keys_and_values(sources), may_see)

    def keys_and_values(self, sources: Tensor) -> KeysAndValues:
        return self._by_head(self.key(sources)), self._by_head(self.value(sources))

    def attend(self, queries: Tensor, sources: KeysAndValues, may_see: Tensor | None = None) -> Tensor:
        """(b, T, W); None: each query attends to all sources."""
        found = scaled_dot_product_attention(self._by_head(self.query(queries)), *sources, attn_mask=may_see)
        return self.out(found.transpose(1, 2).flatten(2))

    def _by_head(self, features: Tensor) -> Tensor:
        return features.unflatten(2, (self.heads, -1)).transpose(1, 2)


class ImageTokens:
    """Keeps the features before pooling of an image tower's last forward pass.

    Only of a pass with gradients. A hook on the tower's last norm takes them, so the tower runs as it would without a
    decoder: split, compiled or checkpointed. Views go through the tower's parts (`distiller.py`) and are not kept.
    """

    def __init__(self, visual: nn.Module) -> None:
        self._last: Tensor | None = None
        self._is_running = False
        visual.register_forward_pre_hook(lambda *_: setattr(self, "_is_running", True))
        visual.register_forward_hook(lambda *_: setattr(self, "_is_running", False))
        last_norm(visual)[0].register_forward_hook(self._keep)

    def _keep(self, _module: nn.Module, _inputs: Any, output: Tensor) -> None:
        if self._is_running and torch.is_grad_enabled():
            self._last = output

    def take(self) -> Tensor:
        """(b, P, image_width); to be called once after each forward pass."""
        assert self._last is not None
        taken, self._last = self._last, None
        return taken


def read_image_tokens(visual: nn.Module, pixels: Tensor) -> Tensor:
    """Run an image tower for its features before pooling; without a graph too.

    Args:
        pixels: (b, 3, S, S) float.

    Returns:
        (b, P, image_width).
    """
    found: list[Tensor] = []
    with last_norm(visual)[0].register_forward_hook(lambda _module, _inputs, output: found.append(output)):
        visual(pixels)
    return found[0]


def last_norm(visual: nn.Module) -> tuple[nn.Module, int]:
    """Return the last norm before an image tower's pooling, and its width.

    Raises:
        ValueError: if the tower is no ViT of timm or open_clip that pools after its last norm.
    """
    trunk: Any = getattr(visual, "trunk", visual)
    if hasattr(trunk, "blocks") and hasattr(trunk, "norm") and isinstance(getattr(trunk, "embed_dim", None), int):
        return trunk.norm, int(trunk.embed_dim)
    if hasattr(trunk, "ln_post") and trunk.attn_pool is None and not trunk.final_ln_after_pool:
        return trunk.ln_post, int(trunk.ln_post.normalized_shape[0])
    raise ValueError(
        f"model.decoder: the image tower ({type(trunk).__name__}) has no features before pooling that it could read: "
        "take a ViT of timm or open_clip that pools after its last norm, or leave model.decoder out"
    )


def build_decoder(model: ModelConfig, visual: nn.Module, text: Any) -> Decoder:
    """Return the decoder of `model.decoder`, with fresh weights.

    Args:
        visual, text: the towers.

    Raises:
        ValueError: if the image tower has no features to read, or sizes are missing or do not fit.
    """
    assert model.decoder is not None
    given = model.decoder
    config = tower_config(model)["text_cfg"]
    is_other = bool(config.get("hf_model_name"))
    sizes = {"layers": given.layers, "width": given.width, "heads": given.heads}
    if not is_other:
        own = {"layers": max(1, config.get("layers", 12) // 2), "width": config.get("width", 512)}
        own["heads"] = config.get("heads", 8)
        sizes = {name: size or own[name] for name, size in sizes.items()}
    missing = [name for name, size in sizes.items() if size is None]
    if missing:
        raise ValueError(
            f"model.decoder.{missing[0]}: a text tower of transformers says none: give layers, width, heads"
        )
    layers, width, heads = (int(size or 0) for size in sizes.values())
    if width % heads:
        raise ValueError(f"model.decoder: width={width} does not divide by heads={heads}")
    mlp_width = math.floor(width * config.get("mlp_ratio", 4.0))
    if mlp_width < 1:
        raise ValueError(
            f"model.decoder: width={width} times the text tower's mlp_ratio is below 1: take a larger width"
        )
    _, context_length, _ = shapes(model)
    return Decoder(
        layers=layers,
        width=width,
        heads=heads,
        mlp_width=mlp_width,
        image_width=last_norm(visual)[1],
        vocab_size=int(text.vocab_size),
        context_length=context_length,
        has_bias=given.bias,
    )
