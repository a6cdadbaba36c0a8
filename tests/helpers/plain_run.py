"""A training run in plain torch, by the docs alone: imports nothing of sigray but the written definition of its draws.

One process computes each global batch at once: float64, the whole B x B matrix of logits, no micro-batches. Every
number comes from the sections of a run's YAML: a missing key is a KeyError, so no default of sigray's is repeated here.

B  global batch     S  image size     T  context length
"""

from __future__ import annotations

import copy
import functools
import io
import json
import math
import re
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from tests.golden import definition
from tests.golden.definition import Place

Members = dict[str, bytes]


class PlainStep(NamedTuple):
    """Figures of one step, of before the update; the logits are without a bias under the softmax."""

    loss: float
    grad_norm: float
    learning_rate: float
    logit_scale: float
    logit_bias: float
    positive_logit_mean: float
    negative_logit_mean: float


class PlainRun(NamedTuple):
    steps: list[PlainStep]
    weights: dict[str, Tensor]  # at the end, float64


def run_plainly(config: dict[str, Any], world_size: int = 1, micro_batch_size: int | None = None) -> PlainRun:
    """Train a config to its end.

    Args:
        config: sections of the YAML.
        world_size, micro_batch_size: decide the random state in which rows go through the towers, and nothing else.
    """
    train, seed = config["train"], config["run"]["seed"]
    torch.manual_seed(seed)
    model = build_model(config["model"]).double().train()
    samples, batches = read_stream(config)
    rank_size = train["global_batch_size"] // world_size
    optimizer = PlainOptimizer(model, config["optim"])
    steps = []
    for step, places in enumerate(batches):
        lr = learning_rate(
            config["optim"], step * train["global_batch_size"], len(batches) * train["global_batch_size"]
        )
        images, tokens = batch_of(config, places, samples)
        encoded = []
        for rank in range(world_size):
            for micro_batch, start in enumerate(range(0, rank_size, micro_batch_size or rank_size)):
                stop = min(start + (micro_batch_size or rank_size), rank_size)
                rows = slice(rank * rank_size + start, rank * rank_size + stop)
                torch.manual_seed(definition.step_seed(seed, step, rank, micro_batch))
                encoded.append((model.encode_image(images[rows], True), model.encode_text(tokens[rows], True)))
        image_features, text_features = (torch.cat(features) for features in zip(*encoded, strict=True))
        scale = model.logit_scale.exp()
        value = loss(config, step, image_features, text_features, scale, model.logit_bias)
        model.zero_grad()
        value.backward()
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        norm = torch.stack([(gradient**2).sum() for gradient in gradients]).sum().sqrt()
        logits = scale * image_features @ text_features.T
        if config["loss"]["name"] == "sigmoid":
            logits = logits + model.logit_bias
        pairs = torch.eye(len(logits), dtype=torch.bool)
        means = logits[pairs].mean().item(), logits[~pairs].mean().item()
        steps.append(PlainStep(value.item(), norm.item(), lr, scale.item(), model.logit_bias.item(), *means))
        limit = config["optim"]["grad_clip_norm"]
        if norm > limit:
            for gradient in gradients:
                gradient *= limit / norm
        optimizer.step(lr)
    return PlainRun(steps, {name: tensor.detach() for name, tensor in model.state_dict().items()})


def build_model(config: dict[str, Any]) -> nn.Module:
    from open_clip.model import CustomTextCLIP

    return CustomTextCLIP(
        **copy.deepcopy(config["towers"]),
        init_logit_scale=config["init_logit_scale"],
        init_logit_bias=config["init_logit_bias"],
    )


def loss(config: dict[str, Any], step: int, images: Tensor, texts: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """Of a global batch; features (B, D) of unit norm."""
    number = len(images)
    if config["loss"]["name"] == "softmax":
        logits, labels = scale * images @ texts.T, torch.arange(number)
        return (nn.functional.cross_entropy(logits, labels) + nn.functional.cross_entropy(logits.T, labels)) / 2
    signs = 2 * torch.eye(number, dtype=torch.float64) - 1
    terms = -nn.functional.logsigmoid(signs * (scale * images @ texts.T + bias))
    if config["loss"].get("negatives") == "random":
        seed, fraction = definition.step_seed(config["run"]["seed"], step), config["loss"]["negatives_fraction"]
        kept = [[i == j or definition.is_kept(i, j, seed, fraction) for j in range(number)] for i in range(number)]
        terms = terms * torch.tensor(kept)
    return terms.sum() / number


def learning_rate(optim: dict[str, Any], samples_seen: int, num_samples: int) -> float:
    """Of the step that begins after `samples_seen` samples of a run of `num_samples`, rounded up to whole steps."""
    warmup, cooldown = optim["num_warmup_samples"], optim.get("num_cooldown_samples", 0)
    since = samples_seen - warmup
    if since < 0:
        return optim["lr"] * (samples_seen + 1) / (warmup + 1)
    rate = optim["lr"]
    if optim["schedule"] == "cosine":
        rate *= (1 + math.cos(math.pi * since / (num_samples - warmup))) / 2
    if optim["schedule"] == "rsqrt":
        rate *= (1 + since / optim["num_timescale_samples"]) ** -0.5
    left = num_samples - samples_seen
    return rate * left / cooldown if left < cooldown else rate


def decays(optim: dict[str, Any], name: str, parameter: Tensor) -> bool:
    """Whether a parameter of open_clip's own towers loses weight."""
    spared = {
        "matrices": (),
        "kernels": ("token_embedding.weight", "positional_embedding"),
        "timm": ("positional_embedding",),
    }
    return parameter.ndim >= 2 and not name.endswith(spared[optim.get("weight_decay_on", "matrices")])


def layer_scale(optim: dict[str, Any], name: str, num_blocks: int = 1) -> float:
    """Of a parameter of open_clip's own towers with so many blocks."""
    tower, _, path = name.partition(".")
    decay = optim.get("layer_decay", {}).get(tower, 1.0)
    if block := re.search(r"resblocks\.(\d+)", path):
        return decay ** (num_blocks - int(block[1]))
    is_before = path.startswith(("conv1", "class_embedding", "positional_", "ln_pre", "token_embedding"))
    return decay ** (num_blocks + 1) if is_before else 1.0


class PlainOptimizer:
    """AdamW of torch, or Adafactor's equations, with a rate and a decay for each parameter."""

    def __init__(self, model: nn.Module, optim: dict[str, Any]) -> None:
        self._optim = optim
        self._parameters: list[tuple[nn.Parameter, float, float]] = []  # parameter, times the rate, weight decay
        for name, parameter in model.named_parameters():
            entry = next((group for group in optim["groups"] if re.fullmatch(group["match"], name)), {})
            decay = entry.get("weight_decay", optim["weight_decay"]) if decays(optim, name, parameter) else 0.0
            self._parameters.append((parameter, entry.get("lr_scale", 1.0) * layer_scale(optim, name), decay))
        self._num_steps = 0
        self._state = [{"rows": 0.0, "columns": 0.0, "square": 0.0, "mean": 0.0} for _ in self._parameters]
        self._adamw = torch.optim.AdamW(
            [{"params": [p], "weight_decay": decay} for p, _, decay in self._parameters],
            betas=(optim["beta1"], optim["beta2"]),
            eps=optim.get("eps", 1.0),
        )

    def step(self, lr: float) -> None:
        self._num_steps += 1
        if self._optim["name"] == "adamw":
            for group, (_, lr_scale, _) in zip(self._adamw.param_groups, self._parameters, strict=True):
                group["lr"] = lr * lr_scale
            self._adamw.step()
            return
        with torch.no_grad():
            for (parameter, lr_scale, decay), state in zip(self._parameters, self._state, strict=True):
                if parameter.grad is not None:
                    update = self._adafactor(parameter.grad, state)
                    parameter -= lr * lr_scale * (update + decay * parameter)

    def _adafactor(self, gradient: Tensor, state: dict[str, Any]) -> Tensor:
        """big_vision's: second moment by rows and columns of matrices, momentum of the scaled gradient in bfloat16."""
        beta1, beta2 = self._optim["beta1"], min(self._optim["beta2"], 1 - self._num_steps**-0.8)
        square = gradient**2 + 1e-30
        if gradient.ndim >= 2 and sorted(gradient.shape)[-2] >= 32:
            assert gradient.ndim == 2, "the tests' towers have no larger convolution"
            state["rows"] = beta2 * state["rows"] + (1 - beta2) * square.mean(1, keepdim=True)
            state["columns"] = beta2 * state["columns"] + (1 - beta2) * square.mean(0, keepdim=True)
            second = state["rows"] * state["columns"] / state["rows"].mean()
        else:
            second = state["square"] = beta2 * state["square"] + (1 - beta2) * square
        scaled = (gradient / second.sqrt()).bfloat16().double()
        state["mean"] = (beta1 * state["mean"] + (1 - beta1) * scaled).bfloat16().double()
        return state["mean"]


# ------------------------------------------------------------------------------------------------------------- data


def read_stream(config: dict[str, Any]) -> tuple[list[list[Members]], list[list[Place]]]:
    """The samples by shard, and the pairs of each step."""
    data, train = config["data"], config["train"]
    mixed = data["shards"] if isinstance(data["shards"], dict) else {"all": {"shards": data["shards"], "weight": 1.0}}
    datasets = [[read_tar(path) for path in sorted(Path(part["shards"]).glob("*.tar"))] for part in mixed.values()]
    batches = definition.global_batches(
        [[len(shard) for shard in dataset] for dataset in datasets],
        [part["weight"] for part in mixed.values()],
        seed=config["run"]["seed"],
        num_lanes=data["num_lanes"],
        shuffle_window=data["shuffle_window"],
        global_batch_size=train["global_batch_size"],
        num_steps=math.ceil(train["num_samples"] / train["global_batch_size"]),
    )
    return [shard for dataset in datasets for shard in dataset], batches


def read_tar(path: Path) -> list[Members]:
    """The samples of a shard: neighbouring members with one key, ending -> content."""
    samples: list[Members] = []
    newest = None
    with tarfile.open(path) as tar:
        for member in tar:
            file = tar.extractfile(member)
            assert file is not None, member.name
            key, ending = member.name.split(".", 1)
            if key != newest:
                samples.append({})
                newest = key
            samples[-1][ending] = file.read()
    return samples


def batch_of(config: dict[str, Any], places: list[Place], samples: list[list[Members]]) -> tuple[Tensor, Tensor]:
    """(B, 3, S, S) float64 and (B, T) int."""
    seed, model = config["run"]["seed"], config["model"]
    size, text = model["towers"]["vision_cfg"]["image_size"], model["towers"]["text_cfg"]
    pixels = [image_of(config["data"], samples[place[1]][place[2]], place, seed, size) for place in places]
    captions = [caption_of(config["data"], samples[place[1]][place[2]], place, seed) for place in places]
    tokens = tokenizer()(captions, text["context_length"])
    noise = config["train"].get("label_noise")
    if noise is not None:
        kinds = definition.NOISE[noise["kind"]]
        if definition.ALIGNMENT in kinds:
            tokens = tokens[definition.caption_rows(places, seed, noise["fraction"])]
        for row, place in enumerate(places):
            chosen = {kind for kind in kinds if definition.is_corrupted(place, seed, kind, noise["fraction"])}
            if definition.IMAGE in chosen:
                pixels[row] = definition.noise_image(place, seed, size)
            if definition.TEXT in chosen:
                words = definition.noise_caption(place, seed, text["context_length"], text["vocab_size"])
                tokens[row] = torch.tensor(words)
    images = torch.from_numpy(np.stack(pixels)).double() / 255
    images = (images - torch.tensor(model["image_mean"]).double()) / torch.tensor(model["image_std"]).double()
    return images.permute(0, 3, 1, 2), tokens


@functools.cache
def tokenizer() -> Callable[[list[str], int], Tensor]:
    import open_clip

    return open_clip.SimpleTokenizer()


def image_of(data: dict[str, Any], members: Members, place: Place, seed: int, size: int) -> np.ndarray:
    """(S, S, 3) uint8."""
    from torchvision.transforms.v2.functional import InterpolationMode, resize

    image = np.array(Image.open(io.BytesIO(members["png"])))
    if data["crop"] == "center":
        assert image.shape == (size, size, 3), "the centre of other images is resized, which the tests leave out"
        return image
    numbers = definition.uniforms(seed, place, "crop")
    top, left, height, width = definition.crop_box(*image.shape[:2], data["crop_scale"], data["crop_ratio"], numbers)
    box = torch.from_numpy(image[top : top + height, left : left + width]).permute(2, 0, 1)
    return resize(box, [size, size], InterpolationMode.BICUBIC, antialias=True).permute(1, 2, 0).numpy()


def caption_of(data: dict[str, Any], members: Members, place: Place, seed: int) -> str:
    def texts(source: str) -> Iterator[str]:
        if not source.startswith("json:"):
            yield members[source].decode()
            return
        value = json.loads(members["json"])[source.removeprefix("json:")]
        yield from [value] if isinstance(value, str) else value

    captions = {source: list(texts(source)) for source in data["captions"]}
    return definition.choose_caption(data["captions"], captions, definition.uniforms(seed, place, "caption"))
