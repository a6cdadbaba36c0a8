"""Members and map functions that a training loop of the user's adds to a sample.

Members are decoded by webdataset's own decoders, except those that run code from the tar. A map function
runs in the data-shard worker, after the image is decoded and before the caption is tokenized.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from sigray.workers.data.decode import Refused, SampleRandom
from sigray.workers.data.tar import DataError, TarSample

Map = Callable[[dict[str, Any]], dict[str, Any] | None]
_RUN_CODE = ("pkl", "pickle", "pyd", "pth")
IN_BATCH = ("images", "tokens", "samples", "replaced")
"""Keys of a batch that no member and no map function may give."""
_OWN = ("image", "caption")
_NAMES = ("__key__", "__url__")
RESERVED = (*IN_BATCH, *_OWN, *_NAMES, "__seed__")
"""Keys that no member may have."""


@dataclass(frozen=True)
class Extras:
    """What a sample has beside image and tokens.

    Args:
        members: endings of further members, in lower case.
        map: called with a sample as a dict. Its keys: `image`, (S, S, 3) uint8, a copy; `caption`; each member, None if
            the sample lacks it; `__key__`, `__url__`; `__seed__`, an integer drawn for this sample in this epoch. It
            returns the dict, changed or a new one. None: the sample is refused, counted and replaced.

    Raises:
        ValueError: a member's decoder would run code from the tar.
    """

    members: tuple[str, ...] = ()
    map: Map | None = None

    def __post_init__(self) -> None:
        if self.map is not None and not callable(self.map):
            raise ValueError(f"map={self.map!r}: a function of a sample expected")
        for ending in self.members:
            if ending.rpartition(".")[2] in _RUN_CODE:
                raise ValueError(
                    f"members: {ending!r} is decoded by pickle, which runs code from the tar: write .npy, .npz or "
                    ".json members"
                )

    @property
    def map_name(self) -> str | None:
        """What the map function is called; None without one."""
        return None if self.map is None else getattr(self.map, "__qualname__", type(self.map).__name__)

    def add(
        self, sample: TarSample, url: str, caption: str, image: np.ndarray, random: SampleRandom
    ) -> tuple[str, dict[str, Any]]:
        """Return the caption, and the sample's further values by key.

        A map function's image is written to `image`.

        Raises:
            Refused: a member cannot be decoded, or the map function returned None.
            DataError: the map function failed; the message names key and shard.
        """
        values: dict[str, Any] = {"__key__": sample.key, "__url__": url}
        for ending in self.members:
            content = sample.members.get(ending)
            values[ending] = None if content is None else _decode(ending, bytes(content))
        if self.map is None:
            return caption, values
        name = self.map_name
        given = {**values, "image": image.copy(), "caption": caption, "__seed__": _seed(random)}
        try:
            mapped = self.map(given)
            if mapped is None:
                raise Refused(f"refused by {name}")
            return self._taken(mapped, image)
        except Refused:
            raise
        except (Exception, SystemExit, KeyboardInterrupt) as error:
            raise DataError(f"{url} key {sample.key}: map={name}: {type(error).__name__}: {error}") from error

    @staticmethod
    def _taken(mapped: dict[str, Any], image: np.ndarray) -> tuple[str, dict[str, Any]]:
        """Check what the map function returned, and write its image to the batch."""
        if not isinstance(mapped, dict) or not {*_OWN, *_NAMES} <= mapped.keys():
            raise TypeError("return the sample, a dict with `image`, `caption`, `__key__` and `__url__`, or None")
        if taken := [key for key in IN_BATCH if key in mapped]:
            raise TypeError(f"{taken}: a batch has other values of this name")
        pixels = np.asarray(mapped["image"])
        if pixels.shape != image.shape or pixels.dtype != image.dtype:
            raise TypeError(f"image: {image.shape} {image.dtype} expected, {pixels.shape} {pixels.dtype} returned")
        if not isinstance(mapped["caption"], str):
            raise TypeError(f"caption: a text expected, {type(mapped['caption']).__name__} returned")
        image[:] = pixels
        return mapped["caption"], {key: value for key, value in mapped.items() if key not in (*_OWN, "__seed__")}


def _decode(ending: str, content: bytes) -> Any:
    """Return a member's value; of an unknown ending, its bytes."""
    decode = _decoders().get(ending.rpartition(".")[2])
    if decode is None:
        return content
    try:
        return decode(content)
    except Exception as error:
        raise Refused(f"unreadable {ending} member") from error


@functools.cache
def _decoders() -> dict[str, Callable[[bytes], Any]]:
    from webdataset.autodecode import decoders

    return {ending: decode for ending, decode in decoders.items() if ending not in _RUN_CODE}


def _seed(random: SampleRandom) -> int:
    return int.from_bytes(hashlib.blake2b(random.place, digest_size=8, person=b"map").digest(), "little")
