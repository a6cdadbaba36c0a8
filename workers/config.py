"""The settings of the workers, one model for each section of the YAML.

They stand here and not in the files that they configure, because the driver checks a config before it imports torch.
That import takes 5 s cold, and an unknown key must fail at once. `orchestrator/config.py` puts the sections
together. The file is long because each key has its sentence here, from which docs/config.md is made.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from sigray.workers.tower_limits import check_towers
from sigray.workers.urls import local_or_url, local_path, readable

PositiveInt = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Accelerator = Literal["cpu", "cuda", "tpu", "xla_cpu"]
Precision = Literal["fp32", "tf32", "bf16"]
TOWER_FILE_ENDINGS = (".onnx", ".pt", ".ts")


def _patterns(named: Any) -> Any:
    """Check patterns of shards; datasets check their own."""
    if not named:
        raise ValueError(f"{named!r} names no shards: give a path, a folder, a pattern, or a list of these")
    if isinstance(named, dict):
        return named
    return readable(named) if isinstance(named, str) else [readable(pattern) for pattern in named]


@dataclass(frozen=True)
class Place:
    """Marks a key whose value names files: a submitted job carries or refuses them.

    Attributes:
        kind: file: small, and carried. shared: a place that all hosts of a cluster see. host: a folder of each host.
        path_of: returns the path in a value; None if the value names no file.
    """

    kind: Literal["file", "shared", "host"]
    path_of: Callable[[str], str | None] = str


LocalOrUri = Annotated[str, AfterValidator(local_or_url), Place("shared")]
LocalFolder = Annotated[str, AfterValidator(local_or_url), Place("host")]
LocalPath = Annotated[str, AfterValidator(local_path), Place("host")]
_HUB = "hf-hub:"
WeightsPlace = Annotated[
    str,
    AfterValidator(lambda place: place if place.startswith(_HUB) else readable(place)),
    Place("file", lambda place: None if place.startswith(_HUB) else place),
]
# Checked outside the union, so that an error names the key and not the members of the union.
Patterns = Annotated[str | list[str], AfterValidator(_patterns), Place("shared")]


def _image_tower(name: str) -> str:
    """The absolute path or URL of a file, or a factory by its present name."""
    if name.endswith(TOWER_FILE_ENDINGS):
        return readable(name)
    # Runs from before the package was called `sigray` have the former name in their config.yaml, and must resume.
    return re.sub(r"^workers\.image_towers:", "sigray.workers.model.image_towers:", name)


def _model_name(name: str) -> str:
    source, colon, folder = name.partition(":")
    return f"{source}:{os.path.abspath(folder)}" if colon and source == "local-dir" else name


def _path_unless(word: str) -> AfterValidator:
    return AfterValidator(lambda name: name if name == word else readable(name))


def _file_unless(word: str) -> Place:
    return Place("file", lambda name: None if name == word else name)


_LOCAL_DIR = "local-dir:"
ModelName = Annotated[
    str,
    AfterValidator(_model_name),
    Place("shared", lambda name: name.removeprefix(_LOCAL_DIR) if name.startswith(_LOCAL_DIR) else None),
]
ImageTowerName = Annotated[
    str,
    AfterValidator(_image_tower),
    Place("file", lambda name: name if name.endswith(TOWER_FILE_ENDINGS) else None),
]
TokenizerName = Annotated[str, _path_unless("open_clip"), _file_unless("open_clip")]
# open_clip reads a name of Hugging Face as a folder, if there is one.
Towers = Annotated[dict[str, Any], Place("shared", lambda name: name if os.path.isdir(name) else None)]


def _pattern(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise ValueError(f"{text!r} is not a regular expression: {error}") from None
    return text


SUBFOLDERS = "subfolders"
ClassesName = Annotated[str, _path_unless(SUBFOLDERS), _file_unless(SUBFOLDERS)]
Pattern = Annotated[str, AfterValidator(_pattern)]
Tower = Literal["visual", "text"]


class Section(BaseModel):
    """Base of every section: unknown keys fail, instances do not change."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, validate_default=True, use_attribute_docstrings=True
    )


class StoresConfig(Section):
    s3_endpoint: str | None = None
    """Endpoint URL of s3:// URLs. Default: AWS_ENDPOINT_URL, else Amazon's own."""
    gs_endpoint: str | None = None
    """Endpoint URL of gs:// URLs.
    Default: GOOGLE_BASE_URL or STORAGE_EMULATOR_HOST, else Google's own."""
    az_endpoint: str | None = None
    """Endpoint URL of az:// URLs, the account included.
    Default: AZURE_STORAGE_ENDPOINT, else Azure's own."""
    region: str | None = None
    """Region of an s3:// bucket.
    Default: AWS_DEFAULT_REGION, the region of the profile, or what Amazon says."""
    profile: str | None = None
    """AWS profile. Default: AWS_PROFILE, or the keys in the environment."""
    anonymous: bool = False
    """Send unsigned requests, for public buckets."""
    requester_pays: bool = False
    """Pay for the requests to a bucket of others.
    gs:// needs GOOGLE_CLOUD_PROJECT for it."""
    signed_urls: LocalPath | None = None
    """File on every host with one presigned https:// URL a line.
    Shards are named without the query; each request adds the query of its line. A renewed file is read again."""
    num_connections: PositiveInt = 4
    """Parts of one shard to fetch at the same time, 16 MiB each.
    Several are in use only if the store is slower than the reader."""
    read_timeout_s: Annotated[float, Field(gt=0)] = 10
    """Seconds without a byte after which a connection is given up.
    Another connection resumes at the same byte."""
    deadline_s: Annotated[float, Field(gt=0)] = 300
    """Seconds without a byte of an object, over all retries, that end the run."""


class WeightedShards(Section):
    shards: Patterns
    """Patterns of WebDataset tars, as data.shards."""
    weight: Annotated[float, Field(ge=0)]
    """Weight of this dataset among the samples seen.
    0: no sample until a phase gives it a weight."""


LINES = "lines"
"""After the colon of a caption source: each line of the member is a caption."""


def caption_member(source: str) -> str:
    """Return the ending of a caption source's member: `json` of `json:captions.en`."""
    return source.partition(":")[0]


def member_ending(text: str) -> str:
    """Return an ending in lower case and without a dot in front, as tars are read."""
    ending = text.strip().lower().removeprefix(".")
    if not ending or re.search(r"[/*?;:]", ending):
        raise ValueError(f"{text!r} can be no member's ending: write what follows the first dot of its name, as in jpg")
    return ending


def _image_keys(keys: list[str]) -> list[str]:
    if not keys:
        raise ValueError("[] names no ending of an image member: write [jpg] or several")
    return list(dict.fromkeys(map(member_ending, keys)))


def _caption_source(source: str) -> str:
    member, colon, path = source.partition(":")
    ending = member_ending(member)
    if colon and not (all(path.split(".")) if ending == "json" else path == LINES):
        raise ValueError(
            f"{source!r} can match no member: write an ending, as in txt, or txt:{LINES}, json:KEY or json:KEY.KEY"
        )
    return ending + colon + path


def _caption_sources(weights: dict[str, float]) -> dict[str, float]:
    sources = {_caption_source(source): weight for source, weight in weights.items()}
    if len(sources) < len(weights):
        raise ValueError(f"{list(weights)[:10]} name a source twice: case, and a dot in front, make no difference")
    return sources


class DataConfig(Section):
    shards: Annotated[str | list[str] | dict[str, WeightedShards], AfterValidator(_patterns), Place("shared")]
    """WebDataset tars: patterns, or several named datasets to mix.
    A pattern is a path, a glob, a brace pattern, a folder, or one of these in s3://bucket/; or a list. A
    mix: {photos: {shards: PATTERN, weight: 3}, drawings: {shards: PATTERN, weight: 1}}."""
    image_keys: Annotated[list[str], AfterValidator(_image_keys)] = ["jpg", "jpeg", "png", "webp"]
    """Endings of a sample's image member; the first ending present is used.
    An ending is what follows the first dot of a member's name, in lower case: that of a.seg.PNG is seg.png."""
    captions: Annotated[
        dict[str, Annotated[float, Field(gt=0)]], Field(min_length=1), AfterValidator(_caption_sources)
    ] = {"txt": 1.0}
    """Sources of a sample's caption, with weights.
    A source is a member's ending (txt), its lines (txt:lines: each is a caption), or a field of a JSON member
    (json:captions.en). Each epoch draws one of the sources that a sample has, and one of the source's captions."""
    languages: dict[str, Annotated[float, Field(gt=0)]] = {}
    """Languages with weights, for caption sources that contain {language}.
    {json:captions.{language}.name: 1} with {en: 2, sw: 1} draws json:captions.en.name twice as often as
    json:captions.sw.name."""
    num_lanes: PositiveInt = 8
    """Number of parallel streams into which an epoch is cut.
    The order of samples depends on it, so keep the value when the machines change."""
    shuffle_window: PositiveInt = 1024
    """Number of samples shuffled together inside a lane; shards are permuted as well."""
    crop: Literal["random", "center"] = "random"
    """Which part of an image is used.
    random: a random crop, another one in each epoch, as open_clip trains; center: the middle square."""
    crop_scale: tuple[Fraction, Fraction] = (0.9, 1.0)
    """Smallest and largest fraction of the image's area in a random crop."""
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Smallest and largest width / height of a random crop."""
    max_image_pixels: PositiveInt = 89_478_485
    """Largest number of pixels of an image.
    Larger images are refused before they are decoded (Pillow's limit against decompression bombs)."""
    block_size: PositiveInt = 128
    """Samples of a lane per request to a data-shard worker.
    128 are 19 MB at 224 px, and 67 MB with the views of self-distillation."""
    num_workers: PositiveInt | tuple[PositiveInt, PositiveInt] = 1
    """Number of data-shard workers: Ray actors that read, decode and tokenize.
    [least, most]: as many as the training workers need."""
    cpus_per_worker: Annotated[float, Field(ge=0)] = 1
    """CPUs that Ray reserves for each data-shard worker."""
    resources_per_worker: dict[str, Annotated[float, Field(gt=0)]] = {}
    """Further Ray resources of each data-shard worker.
    If the cluster file declares a resource `data`, {data: 1} keeps the data-shard workers off the hosts that train."""
    prefetch_batches: PositiveInt = 4
    """Number of global batches to prefetch.
    The batches in the blocks already in use come on top."""
    shared_blocks: PositiveInt = 1
    """Newest blocks of each lane that a data-shard worker keeps.
    Other subscribers of the same stream get them without another decode."""
    cache_mib: NonNegativeInt = 256
    """Memory of each data-shard worker for decoded images, in MiB; 0: none.
    It is filled once. Later epochs of small data with crop: center read from it."""
    worker_timeout_s: Annotated[float, Field(gt=0)] = 120
    """Seconds for one block, after which its data-shard worker is replaced."""
    max_bad_fraction: Fraction = 0.01
    """Largest fraction of refused samples (unreadable image, no caption).
    Above it the run stops and names the reasons. Fewer than 1,024 samples count as 1,024."""
    allow_unclosed: bool = False
    """Accept a tar that ends after a member, without the two closing blocks of a tar.
    A download that broke off there cannot be told from a whole tar."""
    stores: StoresConfig = StoresConfig()
    """How shards in stores are reached: s3://, gs://, az://, https:// and hf://."""
    shard_cache: LocalPath | None = None
    """Folder on each data host that keeps shards of stores for later epochs.
    Null: shards are streamed every time."""
    shard_cache_gib: Annotated[float, Field(gt=0)] = 50
    """Largest size of that folder; the least recently used shards are deleted first."""

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
    def _read_former_s3(cls, content: Any) -> Any:
        """Read `s3`, the former name of `stores`: runs begun before must resume."""
        if not isinstance(content, dict) or not isinstance(content.get("s3"), dict):
            return content
        if content.get("stores"):
            raise ValueError("s3 is the former name of stores: give all keys in data.stores, endpoint as s3_endpoint")
        former = {"s3_endpoint" if key == "endpoint" else key: value for key, value in content["s3"].items()}
        rest = {key: value for key, value in content.items() if key != "s3"}
        return rest | {"stores": former}

    @model_validator(mode="before")
    @classmethod
    def _fill_languages_in(cls, content: Any) -> Any:
        """Fill {language} in, once.

        So the code that reads captions, and a reader of a saved config, see sources without {language}.
        """
        if not isinstance(content, dict) or not isinstance(content.get("captions"), dict):
            return content
        filled: dict[str, float] = {}
        for source, weight in content["captions"].items():
            if "{language}" not in str(source):
                filled[source] = weight
                continue
            if not content.get("languages"):
                raise ValueError(f"captions.{source}: data.languages is empty, so there is no value for {{language}}")
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
        return self


class DecoderConfig(Section):
    layers: Annotated[PositiveInt, Field(le=1000)] | None = None
    """Blocks; null: half of the text tower's, as in SigLIP 2.
    If init_from alone says the towers, its config also says the keys of this section that are not given."""
    width: Annotated[PositiveInt, Field(le=2**14)] | None = None
    """Width; null: the text tower's. So is the factor from width to MLP."""
    heads: Annotated[PositiveInt, Field(le=2**14)] | None = None
    """Attention heads; null: the text tower's."""
    bias: bool = False
    """Biases in norms and MLPs; without them as in big_vision's config of CapPa."""

    def filled_from(self, other: DecoderConfig | None) -> DecoderConfig:
        """Return the keys that were given here, the rest of another decoder."""
        given = {name: getattr(self, name) for name in self.model_fields_set}
        return self if other is None else other.model_copy(update=given)


class HeadsConfig(Section):
    hidden: Annotated[PositiveInt, Field(le=2**16)] = 2048
    """Width of the heads' two hidden layers.
    The defaults of this section are DINO's (arXiv 2104.14294)."""
    bottleneck: Annotated[PositiveInt, Field(le=2**16)] = 256
    """Width of the states that are compared with the prototypes."""
    prototypes: Annotated[int, Field(ge=2, le=2**20)] = 65536
    """Number of prototypes of each head."""


class ModelConfig(Section):
    name: ModelName | None = None
    """An open_clip model config such as ViT-B-16-SigLIP.
    Give this or `towers`, or neither with an init_from that says its towers.
    `local-dir:FOLDER` or `hf-hub:ORG/NAME` takes the config from a folder or repository that has an
    open_clip_config.json. Weights come from init_from."""
    towers: Towers | None = None
    """An open_clip model config written out: embed_dim, vision_cfg, text_cfg.
    Null, and no name: the towers of the folder init_from. timm_model_name: siglip_vit_w64_d4_h4_m256_p8_s32 is SigLIP's
    image tower of any shape (width, depth, heads, MLP, patch, image size), for example."""
    image_size: PositiveInt | None = None
    """Edge of the images in pixels, in place of the size that name or towers say.
    The towers must take it: any ViT of open_clip and any image tower of SigLIP do, with position embeddings of that
    size. Null: the size that they say."""
    image_tower: ImageTowerName | None = None
    """An image tower in place of the one that vision_cfg describes.
    `package.module:function`, called without arguments, returns a torch.nn.Module; or a TorchScript (.pt, .ts) or
    ONNX (.onnx) file. The tower maps (b, 3, S, S) to (b, embed_dim)."""
    tokenizer: TokenizerName | None = None
    """`open_clip` for the model's own tokenizer (its BPE), or a file.
    The file is a Hugging Face tokenizer.json. Null: the one beside the weights of init_from, else `open_clip`."""
    tokenizer_sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None = None
    """Hash of the tokenizer's file. A file of another content is refused.
    Null: a new run records that of the file it begins with."""
    token_bottleneck: PositiveInt | None = None
    """K of a token embedding in two parts, vocabulary x K and K x width.
    For large vocabularies of many languages (paper, section 4.3; K = 96 there). Null: one table."""
    decoder: DecoderConfig | None = None
    """Captioning decoder for loss.caption_weight; `{}` is SigLIP 2's.
    It reads the image tower's features before pooling and has embeddings of its own, of the text tower's tokens. The
    image tower must be a ViT of timm or open_clip. The run's page shows captions that it writes. Null: none."""
    heads: HeadsConfig | None = None
    """Heads and mask token for loss.distill; `{}` has DINO's sizes.
    The image tower must be a ViT of timm without class token, such as SigLIP's. Evaluations and exports of the towers
    do without. Null: none."""
    init_from: WeightsPlace | None = None
    """Initial weights: a folder, a file, a URL of either, or `hf-hub:ORG/NAME`.
    All training workers must see them. Written by transformers (SigLIP, CLIP), open_clip, sigray, big_vision (.npz),
    OpenAI (TorchScript) or timm; docs/models.md has the table. Position and patch embeddings are resized. A job carries
    a file of at most 16 MiB.
    Null: fresh weights."""
    init_fresh: list[Pattern] = []
    """Regular expressions for parameters that stay fresh despite init_from.
    They match whole parameter names, such as text\\..*"""
    init_logit_scale: float = math.log(10)
    """Initial value of t', a log: the paper starts at log 10."""
    init_logit_bias: float | None = -10.0
    """Initial value of b; null: no bias (first row of the paper's table 4).
    The paper starts at -10, so that the many negatives do not dominate the first steps."""
    locked: list[Tower] = []
    """Towers that keep their weights: `visual` (LiT, arXiv 2111.07991) or `text`.
    A locked tower has no gradients, no optimizer state and no dropout."""
    trained_blocks: dict[Tower, PositiveInt] = {}
    """Per tower, number of last blocks to train: {visual: 2}.
    The layers after these blocks train too. The layers before them keep their weights, as if locked."""
    image_mean: tuple[float, float, float] | None = None
    """Mean per channel, of pixels in 0..1.
    Null, here and in the keys below: as the weights or the model of this name were trained; 0.5 with towers."""
    image_std: tuple[PositiveFloat, PositiveFloat, PositiveFloat] | None = None
    """Standard deviation per channel, of pixels in 0..1; null: as image_mean."""
    image_resize: Literal["shortest", "squash", "longest"] | None = None
    """How a whole image becomes a square: in evaluation, and with data.crop=center.
    shortest: the shorter side to S, then the centre; squash: both sides to S; longest: the longer side to S, the rest
    filled. Null: as the weights say; shortest with towers."""
    image_interpolation: Literal["bicubic", "bilinear"] | None = None
    """Filter of every resize, antialiased.
    Null: as the weights say; bicubic with towers."""
    image_fill: Annotated[int, Field(ge=0, le=255)] | None = None
    """Level of the pixels that image_resize=longest adds.
    Null: as the weights say, else 0."""
    text_clean: Literal["none", "lower", "canonicalize", "whitespace"] | None = None
    """How a caption is cleaned for a tokenizer file, by open_clip's names and rules.
    All but none correct encodings, HTML and spaces; lower makes lower case; canonicalize, SigLIP's rule, also removes
    punctuation. Null: as the weights say; none with towers."""
    text_pad_id: NonNegativeInt | None = None
    """Token that fills a short caption, with a tokenizer file.
    Null: as the file says, else its token of a usual name such as [PAD], else 0."""
    text_pad_side: Literal["right", "left"] | None = None
    """Side on which a short caption is filled.
    Null: as the tokenizer file says, else right."""

    @model_validator(mode="after")
    def _one_of_name_and_towers(self) -> ModelConfig:
        if self.name is not None and self.towers is not None:
            raise ValueError("give one of name and towers: both are given")
        if self.name is None and self.towers is None and self.init_from is None:
            raise ValueError("give name or towers, or init_from with a folder that says its towers: none is given")
        if self.towers is not None:
            required = {"embed_dim", "vision_cfg", "text_cfg"}
            missing = required - self.towers.keys()
            unknown = self.towers.keys() - required - {"quick_gelu"}
            if missing or unknown:
                raise ValueError(
                    f"towers needs the keys {sorted(required)}: missing {sorted(missing)}, unknown {sorted(unknown)}"
                )
            try:
                check_towers(self.towers)
            except ValueError as error:
                raise ValueError(f"towers.{error}") from None
        if self.image_tower and self.image_tower.endswith(TOWER_FILE_ENDINGS) and self.decoder is not None:
            raise ValueError(f"image_tower={self.image_tower} is a file, whose features a decoder cannot read")
        if self.image_tower and self.image_tower.endswith(TOWER_FILE_ENDINGS) and "visual" not in self.locked:
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
    """Folder, or URL of a store, of the embeddings that `sigray embed` writes.
    URLs are s3://BUCKET/PREFIX, gs://BUCKET/PREFIX and az://CONTAINER/PREFIX. A locked image tower makes them.
    Training reads them in place of images and never runs the tower. Null: the tower runs in every step."""
    dtype: Literal["bf16", "fp16", "fp32"] = "bf16"
    """Data type of the stored embeddings."""
    num_views: PositiveInt = 1
    """Random crops of each training image, if data.crop is random; an epoch draws one."""
    batch_size: PositiveInt = 128
    """Crops per forward pass of the tower."""


class LabelNoise(Section):
    kind: Literal["image", "text", "alignment", "image_text", "all"]
    """What is corrupted (paper, section 4.8).
    image: images become noise; text: captions become random tokens; alignment: captions move to other pairs of the
    batch; image_text and all: several of these, independently."""
    fraction: Annotated[float, Field(gt=0, le=1)]
    """Fraction of the pairs, for each kind of corruption."""


class TrainConfig(Section):
    num_samples: PositiveInt
    """Length of the run in samples (pairs) seen; rounded up to whole steps."""
    global_batch_size: PositiveInt
    """Pairs in one step over all training workers. The loss uses all of them."""
    micro_batch_size: PositiveInt | None = None
    """Pairs per forward pass of a training worker; null: all of its pairs.
    Must divide the worker's part of the global batch. A smaller value needs less memory and computes each tower's
    forward pass twice (GradCache). The loss still uses every pair of the global batch, and the gradients are the
    same."""
    activation_checkpointing: bool = False
    """Keep only the input of each block and recompute it in the backward pass.
    A third more arithmetic for a fraction of the memory. It combines with micro_batch_size, which costs as much."""
    compile_blocks: bool = False
    """Compile the blocks of the towers with torch.compile.
    On an H100 a step took four fifths of the time, after half a minute at the start. Under XLA everything is
    compiled anyway."""
    precision: Precision = "fp32"
    """fp32, tf32 or bf16.
    tf32: GPUs and TPUs may round the inputs of products. bf16: autocast of the towers and of the products of the
    loss; weights, sums and optimizer stay fp32."""
    log_every_steps: PositiveInt = 10
    """Steps between two lines of metrics; the host reads the device only then."""
    on_bad_loss: Literal["stop", "rewind"] = "stop"
    """What to do if a loss or gradient is NaN or infinite, or the loss leaps.
    stop: end the run; its last good checkpoint stays. rewind: go back to that checkpoint and leave out the bad
    step's batch."""
    max_loss_ratio: Annotated[float, Field(gt=1)] | None = None
    """A loss above this multiple of the recent median is bad too.
    The median is that of the 100 steps before. Null: only NaN and infinity are bad."""
    ema: PositiveInt | None = None
    """Half-life of an average (EMA) of the weights, in samples; null: none.
    Such as a twentieth of num_samples. After each step, average = d average + (1 - d) weights, where d = 0.5 **
    (global_batch_size / ema). The average begins with the weights after the first step. Checkpoints hold both.
    Evaluations give the figures of the average, and those without it beside; exports take the average."""
    ledger: bool = False
    """Write every pair that entered a loss to RUN/ledger/, for `sigray data audit`."""
    label_noise: LabelNoise | None = None
    """Corrupt some training pairs on purpose; null: none.
    For experiments on how much noise a loss tolerates."""


class ShardingConfig(Section):
    weights: Literal["whole", "split"] = "whole"
    """whole: each device holds all weights, gradients and optimizer state.
    split: each device holds a part of them, and a block's weights are gathered while it computes. FSDP2 splits over
    the training workers, XLA over the devices of a worker. For towers that do not fit into one device."""


class DistillConfig(Section):
    local_weight: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the local-to-global term (SILC, arXiv 2310.13355).
    The student sees small crops, the teacher one large crop. SigLIP 2 takes 1.0, times 0.25 for a B model, 0.5 for L
    and g, 1.0 for So400m."""
    masked_weight: Annotated[float, Field(ge=0)] = 0.25
    """Weight of the masked prediction (TIPS, arXiv 2410.16512).
    The student predicts the teacher's states of masked patches of the large crop. SigLIP 2 takes 0.25, times the same
    factor."""
    num_local_views: Annotated[PositiveInt, Field(le=64)] = 8
    """Small crops of each image."""
    local_size: Annotated[PositiveInt, Field(le=2**14)] | None = None
    """Edge of a small crop in pixels.
    Null: 3/7 of the images' edge, as DINO's 96 of 224, rounded to patches."""
    global_scale: tuple[Fraction, Fraction] = (0.4, 1.0)
    """Smallest and largest fraction of the image's area in the large crop; SILC's."""
    local_scale: tuple[Fraction, Fraction] = (0.05, 0.4)
    """Smallest and largest fraction of the image's area in a small crop; SILC's."""
    mask_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Fraction of the patches that are masked; SigLIP 2's."""
    predicts: Literal["masked", "all"] = "masked"
    """Patches whose states are predicted: the masked ones, or all.
    all is iBOT++ of TIPSv2 (arXiv 2604.12012)."""
    teacher: Literal["all", "heads"] = "all"
    """Average weights of the teacher: tower and heads, or heads alone.
    heads is TIPSv2's; the tower is then the student's. The average is that of train.ema, and begins with the phase in
    which this section does."""
    student_temperature: PositiveFloat = 0.1
    """Temperature of the student's softmax; DINO's."""
    teacher_temperature: Annotated[float, Field(ge=0.005)] = 0.04
    """Temperature of the teacher's softmax; DINO's before its warm-up ends."""
    balance: Literal["center", "sinkhorn"] = "center"
    """What keeps the teacher from giving all images one target.
    center subtracts an average over batches from its logits, as DINO. sinkhorn gives each prototype its share of the
    batch in three rounds, as DINOv2 (arXiv 2304.07193). The teacher then sees the whole batch before the student."""
    center_momentum: Fraction = 0.9
    """Momentum of the average of the teacher's logits, for center; DINO's."""

    @model_validator(mode="after")
    def _fields_agree(self) -> DistillConfig:
        if not self.local_weight and not self.masked_weight:
            raise ValueError("local_weight and masked_weight are 0: give one of them, or leave the section out")
        for name in ("global_scale", "local_scale"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise ValueError(f"{name}={[low, high]}: [smallest, largest] expected")
        return self


class LossConfig(Section):
    name: Literal["sigmoid", "softmax"] = "sigmoid"
    """sigmoid, or CLIP's softmax as a baseline."""
    negatives: Literal["all", "random", "hardest", "easiest"] = "all"
    """Negatives that count (paper, section 4.7); all but `all` need sigmoid."""
    negatives_fraction: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Fraction of the negatives that count, if `negatives` is not all."""
    caption_weight: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the captioning loss beside the contrastive loss; SigLIP 2 takes 1.
    Needs model.decoder. It is the mean over captions of the mean cross entropy of their tokens. 0: none."""
    caption_parallel: Fraction = 0.5
    """Fraction of the captions that the decoder predicts in parallel.
    It then reads [MASK] in every place and not the tokens before (CapPa, arXiv 2306.07915). A hash of seed, epoch and
    sample decides. SigLIP 2 takes a half."""
    distill: DistillConfig | None = None
    """Self-distillation from an average of the weights; `{}` is SigLIP 2's.
    Needs model.heads and train.ema. SigLIP 2 begins it at 80 % of the run: see phases. Null: none."""
    tile_size: PositiveInt | None = None
    """Edge of a tile of logits; null: the fastest. It does not change the result."""

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
    """Regular expression for whole parameter names, such as visual\\..* for a tower."""
    lr_scale: Annotated[float, Field(gt=0)] = 1.0
    """Factor on the learning rate of the schedule."""
    weight_decay: Annotated[float, Field(ge=0)] | None = None
    """Weight decay in place of optim.weight_decay; null: the same."""


class OptimConfig(Section):
    name: Literal["adamw", "lion", "adafactor"] = "adamw"
    """adamw, lion or adafactor.
    lion (arXiv 2302.06675) needs half of AdamW's state, lower rates, and beta2 0.99. adafactor is big_vision's
    (arXiv 2106.04560) and needs a quarter of AdamW's state: momentum in bf16 and a factored second moment, whose
    decay rises to beta2 at most."""
    lr: Annotated[float, Field(gt=0)] = 1e-3
    """Largest learning rate of the schedule."""
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Decay of the running average of gradients (momentum)."""
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    """Decay of the second moment.
    0.95 instead of 0.999 keeps training with large batches stable (paper, section 4.6)."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """AdamW's epsilon; the other optimizers have none."""
    weight_decay: Annotated[float, Field(ge=0)] = 1e-4
    """Decoupled weight decay, times the learning rate.
    Never applied to biases, norms, logit_scale and logit_bias."""
    weight_decay_on: Literal["matrices", "kernels", "timm"] = "matrices"
    """Which of the other parameters decay.
    matrices: those of two dimensions or more. kernels: of these, only weights of linear layers, attention and
    convolutions, as in big_vision: no embeddings, no class token, no probe. timm: all but those that the towers' own
    no_weight_decay() names, as open_clip and timm train."""
    layer_decay: dict[Tower, Annotated[float, Field(gt=0, le=1)]] = {}
    """Per tower, factor on the learning rate from block to block: {visual: 0.75}.
    The last block has it once, the first block most often, the embeddings once more. Layers after the blocks keep the
    whole rate."""
    groups: list[ParameterGroup] = []
    """Own learning rate or decay by parameter name; the first match counts."""
    grad_clip_norm: Annotated[float, Field(gt=0)] | None = 1.0
    """Largest norm of all gradients together; null: no clipping."""
    schedule: Literal["cosine", "constant", "rsqrt"] = "cosine"
    """After warm-up: cosine to zero at the end of the run, constant, or rsqrt.
    rsqrt is big_vision's: lr / sqrt(1 + samples since the warm-up / num_timescale_samples)."""
    num_warmup_samples: NonNegativeInt = 0
    """Samples over which the learning rate rises linearly from zero."""
    num_timescale_samples: PositiveInt | None = None
    """Samples after the warm-up at which rsqrt is at 1 / sqrt(2) of lr.
    big_vision's default is 10,000 steps."""
    num_cooldown_samples: NonNegativeInt = 0
    """Samples at the end of the run over which the rate also falls linearly to zero.
    With any schedule."""

    @model_validator(mode="after")
    def _timescale_is_of_rsqrt(self) -> OptimConfig:
        if (self.schedule == "rsqrt") != (self.num_timescale_samples is not None):
            remedy = "set it, as to 10,000 global batches" if self.schedule == "rsqrt" else "only rsqrt has one"
            raise ValueError(
                f"schedule={self.schedule} with num_timescale_samples={self.num_timescale_samples}: {remedy}"
            )
        return self


class PhaseConfig(Section):
    start: PositiveFloat
    """Where the phase begins; keys that it leaves out are as in the phase before.
    Below 1, a fraction of train.num_samples; else a number of samples seen. Rounded up to a whole step."""
    image_size: PositiveInt | None = None
    """Edge of the images in pixels, as model.image_size.
    Position embeddings are resized at the border."""
    weights: dict[str, Annotated[float, Field(ge=0)]] | None = None
    """Weights of all datasets of data.shards, by name.
    0 leaves a dataset out. Each dataset goes on where it was, so its epochs stay whole."""
    loss: dict[str, Any] = {}
    """Keys of `loss` that change."""
    optim: dict[str, Any] = {}
    """Keys of `optim` that change.
    name, groups, layer_decay and weight_decay_on cannot."""
    schedule: Literal["kept", "fresh"] = "kept"
    """kept: the learning rate goes on along its schedule.
    fresh: that schedule ends here, and one of its own begins, with its warm-up. It ends with the run, or where the next
    fresh one begins."""
    stretch: PositiveFloat = 1.0
    """How many times more slowly this phase goes along its schedule.
    With 3.75, a phase of 3.75 times as many samples has the same learning rates: each counts as 1 / 3.75."""
    init_fresh: list[Pattern] = []
    """Regular expressions for parameters that start fresh here.
    They lose their optimizer state too. They match whole names of parameters that train."""


class EvalSet(Section):
    shards: Patterns
    """WebDataset tars, as data.shards, or a folder of images.
    The folder has a subfolder of images for each class."""
    classes: ClassesName | None = None
    """Classes of zero-shot classification; null: only retrieval is measured.
    A JSON list of {id, name}; a .txt with a name in each line, whose ids are 0, 1, 2...; or `subfolders`. With
    `subfolders`, the folders of `shards` name the classes (underscores stand for spaces)."""
    class_field: str = "class"
    """Key of a sample's .json member that holds the class id.
    Without that key the .cls member holds the id; in a folder of images, the subfolder's name is the id."""
    templates: list[str] = ["{}"]
    """Prompts; `{}` is the class name. The features of several are averaged."""
    retrieval: bool = True
    """Measure image-to-text and text-to-image recall over the whole set.
    All captions of an image count. Set it to false if the set has no captions."""
    linear_probe: Patterns | None = None
    """Images with classes, as `shards`, to fit a linear classifier on.
    The classifier of image features is measured on `shards`. All features are held in memory."""
    languages: list[str] = []
    """Languages to measure one by one, with the captions of language_captions."""
    language_captions: Annotated[str, AfterValidator(_caption_source)] = "json:captions.{language}.name"
    """Source, as in data.captions, of a sample's captions in a language.
    If the set has classes, the first caption is the name of the class in that language."""

    @model_validator(mode="after")
    def _check_fields(self) -> EvalSet:
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
    """Named held-out sets; every checkpoint is evaluated on each.
    A few samples of each set are checked before anything starts."""
    at_start: bool | None = None
    """Evaluate the initial weights too, at 0 samples, beside training.
    Default: only with model.init_from, and not in the trials of a sweep."""
    batch_size: PositiveInt = 256
    """Images, or prompts, per forward pass."""
    num_workers: PositiveInt = 1
    """Ray workers that share one evaluation, beside training.
    The figures are the same with any number. Raise it if an evaluation takes longer than the time between
    checkpoints."""
    cpus_per_worker: PositiveInt = 1
    """CPUs that Ray reserves for each evaluation worker, and its threads.
    Another number may change the last bits of figures."""
    accelerator: Literal["cpu", "cuda"] = "cpu"
    """Where the evaluation workers run the towers, in float32.
    cuda: each worker has a GPU of its own, which training must leave free."""
    pixel_baseline: bool = False
    """Also classify by the nearest training image in raw 16 x 16 pixels.
    Reads all training data: for small sets."""
    num_sheet_images: NonNegativeInt = 24
    """Images per set that the report shows with their five best captions.
    With a trained model.decoder also with the caption that it writes, sets without classes too."""


class CheckpointConfig(Section):
    save_every_steps: PositiveInt | None = 500
    """Steps between checkpoints; null: by time alone.
    The end of the run and an interrupt always write a checkpoint."""
    save_every_s: Annotated[float, Field(gt=0)] | None = 600
    """Seconds after which a checkpoint is due too; null: by steps alone.
    It is written at the next line of metrics. This bounds how much work a dead machine costs."""
    keep_newest: PositiveInt = 3
    """Number of newest checkpoints to keep; the two keys below keep others too."""
    keep_every_samples: PositiveInt | None = None
    """Keep the first checkpoint at or after each multiple of so many samples seen."""
    keep_best: str | None = None
    """Keep the best checkpoint by this figure of its evaluation.
    Such as zero_shot.emoji.top1; higher is better."""
    storage_timeout_s: Annotated[float, Field(gt=0)] = 900
    """Seconds that the storage may refuse a checkpoint before the run fails.
    Until then training continues and the write is retried. The run fails only when it needs the write: at its end,
    or when the next checkpoint is due."""
