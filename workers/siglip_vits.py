"""Names of SigLIP's image towers.

open_clip builds such a tower by a name of timm, and timm has names for four widths only. So sigray gives timm names for
all other shapes: `siglip_vit_w64_d4_h4_m256_p8_s32` is a ViT with attention pool of width 64, 4 blocks of 4 heads, an
MLP of 256, patches of 8 pixels and images of 32. Without an ending, its activation is GELU; `_gelu_tanh` and
`_quick_gelu` name the others. Plain open_clip knows timm's own names only.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass

ACTIVATIONS = {"gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "quick_gelu": "quick_gelu"}
"""By transformers' name (`hidden_act`): timm's name of the same activation."""
_PREFIX = "siglip_vit_"
_SIZES = "_".join(rf"{letter}(\d{{1,9}})" for letter in "wdhmps")
_NAME = re.compile(rf"{_PREFIX}{_SIZES}(?:_(gelu_tanh|quick_gelu))?", re.ASCII)
_TIMM_WIDTHS = {
    (768, 12, 12, 3072): "base",
    (1024, 24, 16, 4096): "large",
    (1152, 27, 16, 4304): "so400m",
    (1536, 40, 16, 6144): "giantopt",
}
TIMM_SHAPES: dict[tuple[str, int, str], tuple[int, ...]] = {
    ("base", 16, "gelu"): (224, 256, 384, 512),
    ("base", 32, "gelu_tanh"): (256,),
    ("large", 16, "gelu"): (256, 384, 512),
    ("so400m", 14, "gelu"): (224, 378, 384),
    ("so400m", 16, "gelu_tanh"): (256, 384, 512),
    ("giantopt", 16, "gelu_tanh"): (256, 384),
}
"""By size, patch and activation: the image sizes for which timm has a name."""


@dataclass(frozen=True)
class SiglipVit:
    """Shape of an image tower of SigLIP; sizes of patches and images in pixels."""

    width: int
    depth: int
    heads: int
    mlp: int
    patch_size: int
    image_size: int
    act: str = "gelu"

    @property
    def name(self) -> str:
        """Return timm's name of this shape, else ours."""
        size = _TIMM_WIDTHS.get((self.width, self.depth, self.heads, self.mlp), "")
        if self.image_size in TIMM_SHAPES.get((size, self.patch_size, self.act), ()):
            return f"vit_{size}_patch{self.patch_size}_siglip_{self.image_size}"
        sizes = f"w{self.width}_d{self.depth}_h{self.heads}_m{self.mlp}_p{self.patch_size}_s{self.image_size}"
        return _PREFIX + sizes + ("" if self.act == "gelu" else f"_{self.act}")


def resized(timm_name: str, image_size: int) -> str:
    """Return the name of the same tower for another image size.

    A name that is not of SigLIP's towers stays.
    """
    shape = siglip_vit(timm_name)
    found = re.fullmatch(r"vit_([a-z0-9]+)_patch(\d+)_siglip_(\d+)", timm_name)
    if shape is None and found is not None:
        for (size, patch_size, act), sizes in TIMM_SHAPES.items():
            if (size, str(patch_size)) == found.groups()[:2] and int(found[3]) in sizes:
                dims = next(dims for dims, name in _TIMM_WIDTHS.items() if name == size)
                shape = SiglipVit(*dims, patch_size, int(found[3]), act)
    return timm_name if shape is None else dataclasses.replace(shape, image_size=image_size).name


def siglip_vit(timm_name: str) -> SiglipVit | None:
    """Return the shape that one of our names holds; None for any other name.

    Raises:
        ValueError: a name begins as ours and holds no shape.
    """
    if not timm_name.startswith(_PREFIX):
        return None
    found = _NAME.fullmatch(timm_name)
    if found is None:
        raise ValueError(
            f"{timm_name!r:.200} holds no shape: write {_PREFIX}w64_d4_h4_m256_p8_s32 (width, depth, heads, MLP, patch "
            "and image size), then perhaps _gelu_tanh or _quick_gelu"
        )
    *sizes, act = found.groups()
    width, depth, heads, mlp, patch_size, image_size = map(int, sizes)
    return SiglipVit(width, depth, heads, mlp, patch_size, image_size, act or "gelu")
