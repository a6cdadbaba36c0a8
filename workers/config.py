"""The settings of the workers, one model per section of the YAML.

They stand here and not in the files that they configure because the driver checks a config before it imports torch
(5 s cold, FACTS of Ray 2.60): an unknown key must not cost a user twenty seconds. `orchestrator/config.py` puts the
sections together.
"""

from __future__ import annotations

import math
import os
import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

PositiveInt = Annotated[int, Field(gt=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Accelerator = Literal["cpu", "cuda", "tpu", "xla_cpu"]
Precision = Literal["fp32", "tf32", "bf16"]


def _absolute(path: str) -> str:
    return path if "://" in path else os.path.abspath(path)


# Made absolute when the config is read: Ray moves its workers to another folder, and a run may be resumed from one.
LocalOrUri = Annotated[str, AfterValidator(_absolute)]
LocalPath = Annotated[str, AfterValidator(os.path.abspath)]
Patterns = LocalOrUri | list[LocalOrUri]


def _image_tower(name: str) -> str:
    """The absolute path of a file, or a factory by its present name."""
    if name.endswith((".onnx", ".pt", ".ts")):
        return os.path.abspath(name)
    # The config.yaml of a run from before the package `sigray` has the former name. Such a run must resume.
    former, now = "workers.image_towers:", "sigray.workers.model.image_towers:"
    return now + name.removeprefix(former) if name.startswith(former) else name


ImageTowerName = Annotated[str, AfterValidator(_image_tower)]
TokenizerName = Annotated[str, AfterValidator(lambda name: name if name == "open_clip" else _absolute(name))]


def _pattern(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise ValueError(f"{text!r} is not a regular expression: {error}") from None
    return text


SUBFOLDERS = "subfolders"
ClassesName = Annotated[str, AfterValidator(lambda name: name if name == SUBFOLDERS else _absolute(name))]
Pattern = Annotated[str, AfterValidator(_pattern)]
Tower = Literal["visual", "text"]


class Section(BaseModel):
    """Base of every section: unknown keys fail, instances do not change."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, validate_default=True, use_attribute_docstrings=True
    )


class S3Config(Section):
    endpoint: str | None = None
    """Endpoint URL of an S3-compatible store; by default AWS_ENDPOINT_URL, else Amazon's own."""
    region: str | None = None
    """By default AWS_DEFAULT_REGION or the profile's."""
    profile: str | None = None
    """Profile of the AWS credentials file; by default AWS_PROFILE, or the keys in the environment."""
    anonymous: bool = False
    """Send unsigned requests, for public buckets."""
    num_connections: PositiveInt = 4
    """Parts of one shard that are fetched at the same time where the store is slower than its reader; 8 MiB each."""
    read_timeout_s: Annotated[float, Field(gt=0)] = 10
    """A connection that brings no byte for this long is given up and resumed by another."""
    deadline_s: Annotated[float, Field(gt=0)] = 300
    """An object that brings no byte for this long, however often it was tried, ends the run."""


class WeightedShards(Section):
    shards: Patterns
    """As data.shards."""
    weight: Annotated[float, Field(gt=0)]
    """Share of the samples seen that come from this dataset, relative to the other weights."""


class DataConfig(Section):
    shards: Patterns | dict[str, WeightedShards]
    """WebDataset tars: a path, a glob, a brace pattern, a folder, an s3://bucket/prefix, or a list of these; or several
    named datasets that are mixed: {photos: {shards: PATTERN, weight: 3}, drawings: {shards: PATTERN, weight: 1}}."""
    image_keys: list[str] = ["jpg", "jpeg", "png", "webp"]
    """Endings of a sample's image member; the first one present is used."""
    captions: Annotated[dict[str, Annotated[float, Field(gt=0)]], Field(min_length=1)] = {"txt": 1.0}
    """Where a sample's caption stands, with weights: a member's ending (txt), or a field of a JSON member
    (json:captions.en). Of those that a sample has, one is drawn for each epoch."""
    languages: dict[str, Annotated[float, Field(gt=0)]] = {}
    """Languages with weights, for sources that have {language} in them: {json:captions.{language}.name: 1} with
    {en: 2, sw: 1} stands for json:captions.en.name twice as often as json:captions.sw.name."""
    num_lanes: PositiveInt = 8
    """Parallel streams that an epoch is cut into. A property of the run's order, not of the machines: keep it."""
    shuffle_window: PositiveInt = 1024
    """Samples that are shuffled together inside a lane (shards are permuted as well)."""
    crop: Literal["random", "center"] = "random"
    """random: a random part of the image, another one in each epoch, as open_clip trains; center: the middle square."""
    crop_scale: tuple[Fraction, Fraction] = (0.9, 1.0)
    """Smallest and largest part of the image's area that a random crop takes."""
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Smallest and largest width / height of a random crop."""
    max_image_pixels: PositiveInt = 89_478_485
    """Images with more pixels are refused before they are decoded (Pillow's limit against decompression bombs)."""
    block_size: PositiveInt = 128
    """Samples of a lane that a data-shard worker is asked for together; 19 MB at 224 px."""
    num_workers: PositiveInt | tuple[PositiveInt, PositiveInt] = 1
    """Data-shard workers: Ray actors that read, decode and tokenize. [least, most]: as many as the trainers need."""
    cpus_per_worker: Annotated[float, Field(ge=0)] = 1
    """CPUs that Ray reserves for each data-shard worker."""
    resources_per_worker: dict[str, Annotated[float, Field(gt=0)]] = {}
    """Further Ray resources of each data-shard worker, for example {data: 1} where the cluster file declares it: they
    then stay off the hosts that train."""
    prefetch_batches: PositiveInt = 4
    """Global batches that are asked for ahead of use, besides those that the blocks in use still hold."""
    shared_blocks: PositiveInt = 1
    """Newest blocks of each lane that a data-shard worker keeps for other readers of the same stream."""
    cache_mib: NonNegativeInt = 256
    """Memory of each data-shard worker for decoded images, filled once, for later epochs of small data where crop is
    center; 0: none."""
    worker_timeout_s: Annotated[float, Field(gt=0)] = 120
    """A block that takes longer than this has its data-shard worker replaced."""
    max_bad_fraction: Fraction = 0.01
    """Refused samples (unreadable image, no caption) per sample read, above which the run stops with the reasons."""
    s3: S3Config = S3Config()
    """How s3:// shards are reached."""
    shard_cache: LocalPath | None = None
    """Folder on each data host that keeps s3:// shards for later epochs; null: they are streamed every time."""
    shard_cache_gib: Annotated[float, Field(gt=0)] = 50
    """Size of that folder at most; the shards used longest ago are deleted first."""

    @property
    def total_lanes(self) -> int:
        """Lanes of all datasets together."""
        return self.num_lanes * (len(self.shards) if isinstance(self.shards, dict) else 1)

    def num_requested_batches(self, global_batch_size: int) -> int:
        """Global batches whose blocks are requested at any time, the one in use included.

        All lanes reach the end of a block at about the same step. Requests must reach into the next block, or the
        data-shard workers have nothing to do between one round of blocks and the next.
        """
        return self.prefetch_batches + -(-self.block_size * self.total_lanes // global_batch_size)

    @model_validator(mode="before")
    @classmethod
    def _languages_fill_their_places(cls, content: Any) -> Any:
        """Here, once: what reads captions sees sources without places, and so does one who reads a saved config."""
        if not isinstance(content, dict) or not isinstance(content.get("captions"), dict):
            return content
        filled: dict[str, float] = {}
        for source, weight in content["captions"].items():
            if "{language}" not in str(source):
                filled[source] = weight
                continue
            if not content.get("languages"):
                raise ValueError(f"captions.{source}: data.languages is empty, so {{language}} stands for nothing")
            total = sum(content["languages"].values())
            filled |= {
                source.replace("{language}", language): weight * share / total
                for language, share in content["languages"].items()
            }
        return content | {"captions": filled}

    @model_validator(mode="after")
    def _ranges_rise(self) -> DataConfig:
        for name in ("crop_scale", "crop_ratio", "num_workers"):
            value = getattr(self, name)
            if isinstance(value, tuple) and not 0 < value[0] <= value[1]:
                raise ValueError(f"{name}={list(value)}: [smallest, largest] expected")
        if isinstance(self.shards, dict) and not self.shards:
            raise ValueError("shards={}: at least one dataset expected")
        return self


class ModelConfig(Section):
    name: str | None = None
    """An open_clip model config such as ViT-B-16-SigLIP. Give either this or `towers`."""
    towers: dict[str, Any] | None = None
    """An open_clip model config written out: embed_dim, vision_cfg, text_cfg."""
    image_tower: ImageTowerName | None = None
    """A tower that is not open_clip's, in the place of vision_cfg's: `package.module:function`, called without
    arguments for a torch.nn.Module, or a TorchScript (.pt, .ts) or ONNX (.onnx) file. Takes (b, 3, S, S), gives
    (b, embed_dim)."""
    tokenizer: TokenizerName = "open_clip"
    """`open_clip` for the tokenizer of the model (its BPE), or the path of a Hugging Face tokenizer.json."""
    token_bottleneck: PositiveInt | None = None
    """K of a token embedding in two parts, vocabulary x K and K x width, for large vocabularies of many languages
    (paper, section 4.3; K = 96 there); null: one table."""
    init_from: LocalPath | None = None
    """Weights to begin with: a local file, seen by all training workers, of a sigray or open_clip checkpoint
    (.safetensors, or what torch.load reads with weights_only). Positional embeddings are resized; null: fresh ones."""
    init_fresh: list[Pattern] = []
    """Regular expressions for whole parameter names that stay fresh although init_from has them, as text\\..*"""
    init_logit_scale: float = math.log(10)
    """t' at the start, a log: the paper begins at log 10."""
    init_logit_bias: float | None = -10.0
    """b at the start: the paper begins at -10, so that the many negatives do not dominate the first steps. Null: there
    is no bias (first row of the paper's table 4)."""
    locked: list[Tower] = []
    """Towers that keep their weights: `visual` (LiT, arXiv 2111.07991) or `text`. No gradients, no optimizer state, no
    dropout."""
    trained_blocks: dict[Tower, PositiveInt] = {}
    """Of a tower, train only the last so many blocks and what follows them: {visual: 2}. What comes before keeps its
    weights, as if locked."""
    image_mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    """Per channel, of pixels in 0..1; SigLIP's models use 0.5."""
    image_std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    """Per channel, of pixels in 0..1."""

    @model_validator(mode="after")
    def _one_of_name_and_towers(self) -> ModelConfig:
        if (self.name is None) == (self.towers is None):
            given = "both are given" if self.name else "neither is given"
            raise ValueError(f"give exactly one of name and towers: {given}")
        if self.towers is not None:
            required, allowed = {"embed_dim", "vision_cfg", "text_cfg"}, {"quick_gelu"}
            missing, unknown = required - self.towers.keys(), self.towers.keys() - required - allowed
            if missing or unknown:
                raise ValueError(
                    f"towers needs the keys {sorted(required)}: missing {sorted(missing)}, unknown {sorted(unknown)}"
                )
        if self.image_tower and self.image_tower.endswith((".onnx", ".pt", ".ts")) and "visual" not in self.locked:
            raise ValueError(f"image_tower={self.image_tower} is a file and cannot be trained: set locked=[visual]")
        both = sorted(set(self.locked) & self.trained_blocks.keys())
        if both:
            raise ValueError(f"{both[0]} is in locked and in trained_blocks: leave it out of one of them")
        if self.init_fresh and self.init_from is None:
            raise ValueError(f"init_fresh={self.init_fresh} has no effect without init_from")
        if len(self.locked) > 1:
            raise ValueError(f"locked={self.locked}: one of visual and text at most, or nothing is left to train")
        return self


class EmbeddingsConfig(Section):
    store: LocalOrUri | None = None
    """Folder, or s3:// prefix, of the embeddings that `sigray embed` makes with a locked image tower. Training then
    reads them in the place of images, and never runs the tower; null: the tower runs in every step."""
    dtype: Literal["bf16", "fp16", "fp32"] = "bf16"
    """In which they are stored."""
    num_views: PositiveInt = 1
    """Random crops of each training image (data.crop=random); each epoch draws one of them."""
    batch_size: PositiveInt = 128
    """Crops that go through the tower at once."""


class LabelNoise(Section):
    kind: Literal["image", "text", "alignment", "image_text", "all"]
    """What is corrupted (paper, section 4.8): images become noise, captions random tokens, captions go to other pairs
    of the batch; or several of these, each by itself."""
    fraction: Annotated[float, Field(gt=0, le=1)]
    """Of the pairs, for each kind of corruption."""


class TrainConfig(Section):
    num_samples: PositiveInt
    """Length of the run in samples (pairs) seen; rounded up to whole steps."""
    global_batch_size: PositiveInt
    """Pairs in one step over all training workers. The loss sees every pair of them."""
    micro_batch_size: PositiveInt | None = None
    """Pairs that a training worker takes through the towers at once; must divide its part of the global batch. Null:
    all of them. Smaller ones need less memory and compute each tower's forward pass twice (GradCache); the loss still
    sees every pair of the global batch, and the gradients are the same."""
    activation_checkpointing: bool = False
    """Keep of each block of a tower its input only, and compute the block again in the backward pass: a third more
    arithmetic for a fraction of the memory. It may be combined with micro_batch_size, which costs as much."""
    compile_blocks: bool = False
    """Compile the blocks of the towers with torch.compile: on an H100 a step took four fifths of the time, after half a
    minute at the start. Under XLA everything is compiled anyway."""
    precision: Precision = "fp32"
    """fp32; tf32: GPUs and TPUs may round the inputs of products; or bf16: autocast of the towers and products of the
    loss (weights, sums and optimizer stay fp32)."""
    log_every_steps: PositiveInt = 10
    """Steps between two lines of metrics; the host reads the device only then."""
    on_bad_loss: Literal["stop", "rewind"] = "stop"
    """What happens when a loss or a gradient is NaN or infinite, or the loss leaps: stop the run with its last good
    checkpoint, or go back to that one and leave the bad step's batch out."""
    max_loss_ratio: Annotated[float, Field(gt=1)] | None = None
    """A loss of more than so many times the median of the 100 steps before it is bad too; null: only NaN and infinity
    are."""
    ledger: bool = False
    """Write every pair that entered a loss to RUN/ledger/, for `sigray data audit`."""
    label_noise: LabelNoise | None = None
    """Corrupt a part of the training pairs on purpose, to see what a loss bears; null: none."""


class ShardingConfig(Section):
    weights: Literal["whole", "split"] = "whole"
    """whole: each device holds all weights, gradients and optimizer state. split: each holds a part of them, and a
    block's weights are gathered when it computes: FSDP2 over the training workers; under XLA over a worker's devices.
    For towers that do not fit."""


class LossConfig(Section):
    name: Literal["sigmoid", "softmax"] = "sigmoid"
    """sigmoid, or the softmax of CLIP as a baseline."""
    negatives: Literal["all", "random", "hardest", "easiest"] = "all"
    """Which negatives of the global batch count (paper, section 4.7); other than all: sigmoid only."""
    negatives_fraction: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Of all negatives of the global batch, how many count where `negatives` is not all."""
    tile_size: PositiveInt | None = None
    """Edge of a tile of logits; null for what was measured as fastest on the device. Does not change the result."""

    @model_validator(mode="after")
    def _fields_agree(self) -> LossConfig:
        if self.negatives == "all" and self.negatives_fraction != 1:
            raise ValueError(
                f"negatives_fraction={self.negatives_fraction} has no effect with negatives=all: "
                "set negatives to random, hardest or easiest"
            )
        if self.name == "softmax" and self.negatives != "all":
            raise ValueError(f"negatives={self.negatives} needs name=sigmoid: a softmax normalises over all of them")
        return self


class ParameterGroup(Section):
    match: Pattern
    """Regular expression for whole parameter names, such as visual\\..* for the image tower."""
    lr_scale: Annotated[float, Field(gt=0)] = 1.0
    """Times the learning rate of the schedule."""
    weight_decay: Annotated[float, Field(ge=0)] | None = None
    """In the place of optim.weight_decay; null: the same."""


class OptimConfig(Section):
    name: Literal["adamw", "lion", "adafactor"] = "adamw"
    """adamw; lion (arXiv 2302.06675; half of AdamW's state; wants lower rates, and beta2 0.99); or adafactor as
    big_vision has it (arXiv 2106.04560; a quarter of AdamW's state: momentum in bf16, a factored second moment, whose
    decay rises to beta2 at most)."""
    lr: Annotated[float, Field(gt=0)] = 1e-3
    """Learning rate at the top of the schedule."""
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    """0.95 instead of 0.999 keeps training with large batches stable (paper, section 4.6)."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """AdamW's; the others have none."""
    weight_decay: Annotated[float, Field(ge=0)] = 1e-4
    """Decoupled: times the learning rate, weights shrink by it; never applied to biases, norms, logit_scale and
    logit_bias."""
    groups: list[ParameterGroup] = []
    """Parameters with a rate or decay of their own; the first entry that matches a name counts."""
    grad_clip_norm: Annotated[float, Field(gt=0)] | None = 1.0
    """Largest norm of all gradients together; null to leave them as they are."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """After warm-up: cosine to zero at the end of the run, or constant."""
    num_warmup_samples: NonNegativeInt = 0
    """Samples over which the learning rate rises linearly from zero."""


class EvalSet(Section):
    shards: Patterns
    """WebDataset tars, as data.shards; or a folder with a subfolder of images for each class."""
    classes: ClassesName | None = None
    """Zero-shot classification over these names: a JSON list of {id, name}; a .txt with a name in each line, whose ids
    are 0, 1, 2...; or `subfolders`, for a folder of images whose subfolders are called as their classes (underscores
    stand for spaces). Without it only retrieval is measured."""
    class_field: str = "class"
    """Key of a sample's .json member that holds its class id; where there is none, its .cls member holds it. Of a
    folder of images, the subfolder's name is the id."""
    templates: list[str] = ["{}"]
    """Prompts; `{}` stands for the class name. The features of several are averaged."""
    retrieval: bool = True
    """Image-to-text and text-to-image recall over the whole set. False where it has no captions."""
    linear_probe: Patterns | None = None
    """Images with classes, as `shards`, to fit a linear classifier of image features on; it is measured on `shards`.
    All features are held in memory."""
    languages: list[str] = []
    """Languages to measure apart, each with the captions that language_captions has for it."""
    language_captions: str = "json:captions.{language}.name"
    """Source, as in data.captions, of a sample's caption in a language; with classes, of its class's name."""

    @model_validator(mode="after")
    def _templates_have_a_place(self) -> EvalSet:
        for template in self.templates:
            if "{}" not in template:
                raise ValueError(f"template {template!r} has no {{}} for the class name")
        if self.linear_probe is not None and self.classes is None:
            raise ValueError("linear_probe needs classes: the key of its images' class is class_field")
        if "{language}" not in self.language_captions:
            raise ValueError(f"language_captions={self.language_captions!r} has no {{language}}")
        if not self.templates:
            raise ValueError("templates is empty: at least one prompt such as 'a photo of a {}.' is needed")
        return self


class EvalConfig(Section):
    sets: dict[str, EvalSet] = {}
    """Named held-out sets, each evaluated on every checkpoint."""
    batch_size: PositiveInt = 256
    """Images, or prompts, per forward pass."""
    num_workers: PositiveInt = 1
    """Ray workers that share one evaluation, beside training; the figures are the same with any number. Raise it where
    an evaluation takes longer than the way to the next checkpoint."""
    cpus_per_worker: PositiveInt = 1
    """CPUs that Ray reserves for each of them while it works, and its threads. Another number may change last bits."""
    accelerator: Literal["cpu", "cuda"] = "cpu"
    """Where they run the towers, in float32; cuda: each has a GPU of its own, which must be one that training leaves
    free."""
    pixel_baseline: bool = False
    """Also classify by the nearest training image in raw 16 x 16 pixels. Reads all training data: for small sets."""
    num_sheet_images: NonNegativeInt = 24
    """Images per set that the report shows with their five best captions."""


class CheckpointConfig(Section):
    save_every_steps: PositiveInt | None = 500
    """Steps between checkpoints; null: by time alone. There is always one at the end, and one when the run is
    interrupted."""
    save_every_s: Annotated[float, Field(gt=0)] | None = 600
    """Seconds after which a checkpoint is due too, at the next line of metrics; null: by steps alone. It bounds what a
    dead machine costs."""
    keep_newest: PositiveInt = 3
    """Older ones are deleted, but for those that the two keys below keep."""
    keep_every_samples: PositiveInt | None = None
    """Keep the first checkpoint at or behind each multiple of so many samples seen."""
    keep_best: str | None = None
    """Keep the best checkpoint by this figure of its evaluation, such as zero_shot.emoji.top1; higher is better."""
    storage_timeout_s: Annotated[float, Field(gt=0)] = 900
    """A storage that refuses writes does not stop training; the run ends with an error when its last checkpoint, or one
    that is due while the one before still waits, cannot be written for so long."""
