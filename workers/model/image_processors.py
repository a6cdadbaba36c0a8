"""Reads how an image processor of transformers prepares an image.

size         {"shortest_edge": n}, {"height": n, "width": n}, or n, the shortest edge
crop_size    the same; what is left of the centre
pixels       (levels * rescale_factor - image_mean) / image_std, of levels from 0 to 255
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

_RESAMPLE = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers
_CLIP_MEAN = [0.48145466, 0.4578275, 0.40821073]
_CLIP_STD = [0.26862954, 0.26130258, 0.27577711]
_CLOSE = 1e-6  # to 1, of a scale that is 1


def read_image_processor(config: dict[str, Any], model_type: str, place: str, given: Collection[str]) -> dict[str, Any]:
    """Return the keys of the config that an image processor stands for.

    A field that is not there has the default of the processor's class.

    Args:
        config: content of preprocessor_config.json; empty without the file.
        model_type: of the model beside it.
        place: for messages.
        given: keys of the config that are set, and need nothing from here.

    Raises:
        ValueError: sigray cannot make such pixels.
    """
    kind = str(config.get("image_processor_type") or config.get("feature_extractor_type") or model_type)
    is_clip = kind.lower().startswith("clip")
    where = f"{place}: its image processor has"
    found: dict[str, Any] = {}
    if "image_interpolation" not in given:
        resample = config.get("resample", 3)
        if not isinstance(resample, int) or resample not in _RESAMPLE:
            raise ValueError(
                f"{where} resample={resample!r:.80}, and sigray has 2 (bilinear) and 3 (bicubic): set "
                "model.image_interpolation to take one of them"
            )
        found["image_interpolation"] = _RESAMPLE[resample]
    if "image_resize" not in given:
        found["image_resize"] = _resize(config, is_clip, where)
    if not {"image_mean", "image_std"} <= set(given):
        mean, std = _normalization(config, is_clip, where)
        found |= {"image_mean": mean, "image_std": std}
    return found


def _resize(config: dict[str, Any], is_clip: bool, where: str) -> str:
    def edges(key: str, *, is_edge: bool) -> Any:
        value = config.get(key)
        if isinstance(value, int):
            return {"shortest_edge": value} if is_edge else {"height": value, "width": value}
        return {name: edge for name, edge in value.items() if edge is not None} if isinstance(value, dict) else value

    size = edges("size", is_edge=True)
    crop = edges("crop_size", is_edge=False)
    if size is None:
        size = {"shortest_edge": 224} if is_clip else {"height": 224, "width": 224}
        crop = None
    if config.get("do_resize", True) and isinstance(size, dict):
        edge = size.get("shortest_edge", size.get("height"))
        is_same = crop in (None, {"height": edge, "width": edge})  # the crop leaves the square as it is
        if size.keys() == {"shortest_edge"} and is_same and config.get("do_center_crop", is_clip):
            return "shortest"
        if size == {"height": edge, "width": edge} and (is_same or not config.get("do_center_crop")):
            return "squash"
    fields = ("do_resize", "size", "do_center_crop", "crop_size")
    shown = ", ".join(f"{name}={config[name]!r:.80}" for name in fields if name in config)
    raise ValueError(
        f"{where} {shown}, and sigray scales the shorter side to the model's size and cuts the centre, or squashes: "
        "set model.image_resize (shortest, squash or longest) to take one of these"
    )


def _normalization(config: dict[str, Any], is_clip: bool, where: str) -> tuple[Any, Any]:
    """Return mean and standard deviation of pixels in 0..1."""
    if config.get("do_normalize", True):
        mean = _triple(config, "image_mean", _CLIP_MEAN if is_clip else [0.5] * 3, where)
        std = _triple(config, "image_std", _CLIP_STD if is_clip else [0.5] * 3, where)
    else:
        mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    factor = config.get("rescale_factor", 1 / 255) if config.get("do_rescale", True) else 1
    if type(factor) not in (int, float) or factor <= 0:
        raise ValueError(f"{where} rescale_factor={factor!r:.80}: a number above 0 expected")
    scale = 255 * factor
    if abs(scale - 1) < _CLOSE:
        return mean, std
    return tuple(value / scale for value in mean), tuple(value / scale for value in std)


def _triple(config: dict[str, Any], name: str, default: list[float], where: str) -> tuple[float, ...]:
    values = default if config.get(name) is None else config[name]
    values = [values] * 3 if type(values) in (int, float) else values
    if not isinstance(values, list) or len(values) != 3 or any(type(value) not in (int, float) for value in values):
        raise ValueError(f"{where} {name}={values!r:.80}: three numbers expected, or set model.{name}")
    return tuple(map(float, values))
