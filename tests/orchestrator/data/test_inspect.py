"""`sigray data inspect`: everything that can be wrong with shards and samples is found, named and shown."""

from __future__ import annotations

import base64
import gzip
import io
import json
import os
import re
import shutil
import subprocess
import tarfile
import time
from pathlib import Path

import boto3
import numpy as np
import pytest
from PIL import Image

from sigray.orchestrator.cli.main import main
from sigray.orchestrator.config import ConfigError
from sigray.orchestrator.data.inspect import PICTURE_PX, data_section, inspect_data
from sigray.orchestrator.data.inspect_sheet import write_sheet
from sigray.workers.config import DataConfig
from sigray.workers.data.decode import Decoder, decode_pixels, sample_random
from sigray.workers.data.manifest import read_samples, scan_shards
from tests.helpers.data import drawn_sample, encode_image, write_dataset, write_tar
from tests.helpers.s3 import BUCKET, s3_server
from tests.helpers.tars import END, header

CHROMIUM = shutil.which("chromium")


@pytest.fixture(autouse=True)
def wide_terminal_and_own_memory(monkeypatch, tmp_path):
    monkeypatch.setenv("COLUMNS", "500")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def broken_folder(tmp_path):
    """A sound shard with broken samples, a sound one, and four that cannot be read to the end; one more is missing."""
    folder = tmp_path / "tars"
    samples = [drawn_sample(number) for number in range(40)]
    samples[3]["txt"] = "  \n"
    del samples[5]["txt"]
    samples[7]["png"] = samples[7]["png"][:60]
    samples[9]["png"] = "<html>not found</html>"
    samples[11]["txt"] = b"\xff\xfe\xff"
    del samples[13]["png"]
    for number in (20, 21, 22):
        samples[number]["txt"] = "[red]same[/red] \x1b[31m<b>again</b>"
    write_tar(folder / "a-000.tar", [*samples, drawn_sample(0)])
    sound = write_tar(folder / "a-001.tar", [drawn_sample(number) for number in range(39, 60)]).read_bytes()
    (folder / "a-002.tar").write_bytes(sound[: len(sound) // 2])
    (folder / "a-003.tar").write_bytes(b"")
    (folder / "a-004.tar").write_bytes(sound[:5120] + b"!" + sound[5121:])
    name = b"sample00041.png"
    assert name in sound
    (folder / "a-005.tar").write_bytes(_resized(sound, name, b"-0000001000\0"))
    return folder


def _resized(tar: bytes, name: bytes, size: bytes) -> bytes:
    """The tar with one member's size changed and its checksum right."""
    place = tar.index(name)
    header = bytearray(tar[place : place + 512])
    header[124:136] = size
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return tar[:place] + bytes(header) + tar[place + 512 :]


def run(capsys, *words: object) -> tuple[int, str, str]:
    code = main(["data", "inspect", *map(str, words)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def lines_with(text: str, *parts: str) -> list[str]:
    return [line for line in text.splitlines() if all(part in line for part in parts)]


def test_sound_shards(tar_folder, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, tar_folder)
    assert code == 0, err
    assert lines_with(out, "shards", "4: 4 read whole")
    assert lines_with(out, "samples per shard", "7 least, 18.5 median, 32 most")
    assert lines_with(out, "76 samples (100.0 %) have an image and a caption member")
    assert lines_with(out, "every sample")
    assert lines_with(out, "png", "76", "100.0 %", "image")
    assert lines_with(out, "json", "76", "100.0 %")
    assert lines_with(out, "PNG", ".png", "76")
    assert lines_with(out, "shorter side", *["20"] * 5)
    assert lines_with(out, "txt", "100.0 %", "76", "76")
    assert not re.search("broken|problems|duplicate|most frequent", out)
    assert not list(tmp_path.glob("*.html"))  # without --sheet there is no file


def test_every_fault_is_found_and_named(broken_folder, capsys, tmp_path):
    sheet = tmp_path / "sheet.html"
    pattern = f"{broken_folder}/a-{{000..006}}.tar"
    code, out, err = run(capsys, pattern, tmp_path / "none-*.tar", "data.max_bad_fraction=1", "--all", "--sheet", sheet)
    assert code == 2
    assert "problems with the data, 6: see the last table" in err
    assert lines_with(out, "7: 2 read whole, 5 that cannot be read to the end")
    where = out[out.index("problems, 6") :]
    assert lines_with(where, "none-*.tar", "names no .tar file")
    assert lines_with(where, "a-002.tar", "cut short")
    assert lines_with(where, "a-003.tar", "cut short: the file is empty")
    assert lines_with(where, "a-004.tar", "damaged: no valid tar header at byte 5120")
    assert lines_with(where, "a-005.tar", "damaged: a size that is no number")
    assert lines_with(where, "a-006.tar", "no such file")
    assert lines_with(out, "unreadable image", "2", "a-000.tar sample00007, a-000.tar sample00009")
    assert lines_with(out, "empty caption", "a-000.tar sample00003")
    assert lines_with(out, "no caption", "a-000.tar sample00005")
    assert lines_with(out, "caption is not UTF-8", "a-000.tar sample00011")
    assert lines_with(out, "no image", "a-000.tar sample00013")
    assert lines_with(out, "HTML, XML or SVG", ".png", "1")
    assert lines_with(out, "key comes again in its shard", "1", "a-000.tar sample00000")
    assert lines_with(out, "key comes again in another shard", "a-001.tar sample00039")
    # The caption is shown as it stands, as markup of neither rich nor the terminal.
    assert lines_with(out, "3", "[red]same[/red] [31m<b>again</b>")
    assert "\x1b" not in out
    page = sheet.read_text()
    assert "<b>again</b>" not in page
    assert page.count('class="reason"') == 6
    for reason in ("unreadable image", "empty caption", "no caption", "caption is not UTF-8", "no image"):
        assert f'<p class="reason">{reason}</p>' in page
    for name in ("a-002.tar", "a-003.tar", "a-004.tar", "a-005.tar", "a-006.tar"):
        assert name in page


def test_gzip_in_place_of_a_tar_and_nothing_else(tmp_path, capsys):
    path = write_tar(tmp_path / "a.tar", [drawn_sample(number) for number in range(9)])
    path.write_bytes(gzip.compress(path.read_bytes()))
    code, out, _ = run(capsys, tmp_path)
    assert code == 2
    assert lines_with(out, "1: 0 read whole, 1 that cannot be read to the end")
    assert lines_with(out, "a.tar", "compressed with gzip: unpack it with `mv a.tar")


def test_what_cannot_be_used_is_counted(tmp_path, capsys):
    links = b"".join(header(b"%d.%s" % (n, end), b"2", link=b"x") for n in range(40) for end in (b"png", b"txt"))
    (tmp_path / "a.tar").write_bytes(links + END)
    code, out, err = run(capsys, tmp_path)
    assert code == 2
    assert lines_with(out, "symbolic links", "80", "a tar of data cannot follow them")
    assert lines_with(out, "samples without a usable member", "40")
    assert "not used: 80 symbolic links, 40 samples without a usable member" in err


def test_an_unsorted_tar_that_is_cut_short(tmp_path, capsys):
    """Its last sample, of a key that came before, is not read to its end."""
    names = [f"{number}.{ending}" for ending in ("txt", "png") for number in range(4)]
    (tmp_path / "a.tar").write_bytes(b"".join(header(name.encode()) for name in names))
    code, out, err = run(capsys, tmp_path)
    assert code == 2
    assert "a.tar: cut short" in err
    assert "data.allow_unclosed=true" in err
    assert lines_with(out, "key comes again in its shard", "3", "a.tar 0")
    code, out, _ = run(capsys, tmp_path, "data.allow_unclosed=true")
    assert lines_with(out, "samples of a key that came before", "4", "tar --sort=name")


def test_the_time_limit_holds_between_two_samples(tmp_path, monkeypatch):
    """A tar may have headers without end and no sample."""
    (tmp_path / "a.tar").write_bytes(header(b"nothing") * 100_000 + END)
    begin = time.monotonic()
    found = inspect_data(data_section([str(tmp_path)]), max_s=0.2)
    assert time.monotonic() - begin < 5
    assert found.is_over_time or found.shards[0].is_whole
    assert found.is_over_time != found.shards[0].is_whole


def test_two_members_of_one_name(tmp_path, capsys):
    write_tar(tmp_path / "a.tar", [drawn_sample(number) for number in range(3)])
    with tarfile.open(tmp_path / "b.tar", "w") as tar:
        for name in ("same.txt", "same.png", "same.txt"):
            content = drawn_sample(5)[name[-3:]]
            content = content.encode() if isinstance(content, str) else content
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    code, out, _ = run(capsys, tmp_path)
    assert code == 0
    assert lines_with(out, "samples refused: duplicate key", "1", "b.tar same")
    assert lines_with(out, "duplicate key", "25.0 %", "b.tar same")


def test_training_would_not_start(tmp_path, capsys):
    """Keys that are not the data's: the tables show those that are."""
    write_tar(tmp_path / "a.tar", [{"__key__": "a", "gif": encode_image(np.zeros((9, 7, 3), np.uint8)), "cap": "x"}])
    code, out, _ = run(capsys, tmp_path)
    assert code == 2
    assert lines_with(out, "no usable pair in 1 shards", "members found end in cap, gif")
    assert lines_with(out, "gif", "1", "100.0 %")
    code, out, _ = run(capsys, tmp_path, "data.image_keys=[gif]", "data.captions={cap: 1}")
    assert code == 0
    assert lines_with(out, "PNG", ".gif")
    assert lines_with(out, "shorter side", "7")


def test_training_would_stop(tmp_path, capsys):
    samples = [drawn_sample(number) for number in range(30)]
    for sample in samples[:20]:
        sample["png"] = b"no image"
    write_tar(tmp_path / "a.tar", samples)
    code, out, _ = run(capsys, tmp_path)
    assert code == 2
    assert lines_with(out, "20 of 30 decoded samples are broken, more than data.max_bad_fraction=0.01")


def test_sidecar_that_counts_wrong(tmp_path, capsys):
    write_dataset(tmp_path, [5, 6])
    (tmp_path / "sizes.json").write_text(json.dumps({"shard-000.tar": 5, "shard-001.tar": 7}))
    code, out, _ = run(capsys, tmp_path)
    assert code == 2
    assert lines_with(out, "shard-001.tar", "holds 6 samples, but a sidecar", "says 7")
    assert not lines_with(out, "shard-000.tar", "sidecar")


def test_what_was_read_need_not_be_read_again(tar_folder, tmp_path):
    data = DataConfig(shards=str(tar_folder))
    inspect_data(data)

    def nothing_left(function, files):
        raise AssertionError(f"{files} were not known")

    assert scan_shards(data.shards, data, parallel_map=nothing_left).num_samples == 76


def test_several_captions_in_one_text_are_pointed_out(tmp_path, capsys):
    samples = [drawn_sample(number, 16) | {"txt": b"a cat\na dog\nrain"} for number in range(8)]
    write_tar(tmp_path / "a-000.tar", samples)
    code, out, _ = run(capsys, tmp_path)
    assert code == 0
    assert lines_with(out, "txt of several lines", "8 samples; txt:lines takes each line as a caption")
    code, out, _ = run(capsys, tmp_path, "data.captions={txt:lines: 1}")
    assert "several lines" not in out
    assert lines_with(out, "txt:lines", "100.0 %", "8", "24", "3")


def test_captions_of_several_sources(tmp_path, capsys):
    samples = []
    for number in range(8):
        sample = drawn_sample(number)
        captions = {"de": f"Bild {number}", "alt": ["one", "two words"] if number < 4 else []}
        sample["json"] = json.dumps({"captions": captions}) if number else "{"
        samples.append(sample)
    write_tar(tmp_path / "a.tar", samples)
    code, out, _ = run(capsys, tmp_path, "data.captions={json:captions.de: 3, json:captions.alt: 1}")
    assert code == 0
    assert lines_with(out, "json:captions.de", "75.0 %", "7", "87.5 %", "unreadable json caption: 1")
    assert lines_with(out, "json:captions.alt", "25.0 %", "3", "37.5 %", "6", "2", "empty caption: 4")
    assert lines_with(out, "json:captions.de, characters", *["6"] * 5)
    assert lines_with(out, "json:captions.alt, words", "1", "2")
    assert lines_with(out, "3", "json:captions.alt", "two words")
    assert lines_with(out, "json", "caption json:captions.de, json:captions.alt")


def test_an_even_selection_says_so(tmp_path, capsys):
    write_dataset(tmp_path, [40] * 5)
    found = inspect_data(DataConfig(shards=str(tmp_path)), num_samples=20)
    assert [shard.num_decoded for shard in found.shards] == [4] * 5
    assert found.num_samples == 200  # the headers of all are read
    code, out, _ = run(capsys, tmp_path, "--samples", "20")
    assert code == 0
    assert lines_with(out, "20 samples, spread evenly over the samples read", "--all reads and decodes everything")


def test_more_shards_than_samples(tmp_path):
    write_dataset(tmp_path, [3] * 9)
    found = inspect_data(DataConfig(shards=str(tmp_path)), num_samples=3, num_pictures=3)
    decoded = [shard.number for shard in found.shards if shard.num_decoded]
    assert decoded == [0, 4, 8]  # spread over them, not the first three
    assert sum(len(shard.pictures) for shard in found.shards) == 3


def test_time_limit_stops_and_says_what_was_not_read(tmp_path, capsys, monkeypatch):
    write_dataset(tmp_path, [60] * 12)  # more than there are threads
    monkeypatch.setattr("sigray.orchestrator.data.inspect.MAX_S", 0.0)

    def decode_slowly(*arguments):
        time.sleep(0.05)
        return decode_pixels(*arguments)

    monkeypatch.setattr("sigray.orchestrator.data.inspect.decode_pixels", decode_slowly)
    code, out, _ = run(capsys, tmp_path)
    assert code == 0
    assert lines_with(out, "shards", "12: 0 read whole", "in part", "not opened")
    assert lines_with(out, "until the time limit; --all reads and decodes everything")


def test_the_sheet_shows_what_training_decodes(tmp_path):
    random = np.random.default_rng(0)
    for shard in range(3):
        samples = []
        for number in range(10 * shard, 10 * shard + 10):
            clouds = Image.fromarray(random.integers(0, 256, (5, 4, 3), np.uint8)).resize((80, 100))
            samples.append(drawn_sample(number) | {"png": encode_image(np.asarray(clouds))})
        write_tar(tmp_path / f"{shard}.tar", samples)
    data = DataConfig(shards=str(tmp_path), crop_scale=(0.2, 0.5))
    found = inspect_data(data, num_pictures=8)
    write_sheet(found, tmp_path / "sheet.html")
    page = (tmp_path / "sheet.html").read_text()
    shown = re.findall(r'alt="(\w+)" src="data:image/jpeg;base64,([^"]+)"', page)
    assert len(shown) == 8
    shards = scan_shards(data.shards, data).shards
    samples = {sample.key: (number, sample) for number, s in enumerate(shards) for sample in read_samples(s, data)}
    for key, jpeg in shown:
        number, sample = samples[key]
        expected = np.empty((PICTURE_PX, PICTURE_PX, 3), np.uint8)
        Decoder(data, PICTURE_PX).decode_image(sample.members, expected, sample_random(0, 0, number, sample.index))
        actual = np.asarray(Image.open(io.BytesIO(base64.b64decode(jpeg))), np.int16)
        assert np.abs(actual - expected).mean() < 3  # what JPEG loses; another box differs by 20 and more
        assert f"field number {int(key[-5:])}" in page
    assert "http" not in re.sub(r"<!--.*?-->", "", page)  # nothing is loaded from elsewhere


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_a_browser_draws_the_sheet(broken_folder, tmp_path):
    sheet, picture = tmp_path / "sheet.html", tmp_path / "sheet.png"
    main(["data", "inspect", str(broken_folder), "--sheet", str(sheet)])
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1300,900"]
    subprocess.run(
        [*command, f"--user-data-dir={tmp_path}/profile", f"--screenshot={picture}", sheet.as_uri()],
        check=True,
        capture_output=True,
        timeout=60,
    )
    pixels = np.asarray(Image.open(picture).convert("RGB"))
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 20


def test_patterns_and_overrides(tar_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = data_section(["a/*.tar", "data.image_keys=[jpg]", "date=2024/b.tar", "data.stores.s3_endpoint=http://host"])
    assert data.shards == [f"{tmp_path}/a/*.tar", f"{tmp_path}/date=2024/b.tar"]
    assert data.image_keys == ["jpg"]
    assert data.stores.s3_endpoint == "http://host"
    (tmp_path / "run.yaml").write_text(
        f"run: {{name: a}}\ndata: {{shards: {tar_folder}, captions: {{json:class: 1}}}}\n"
        "model: {name: ViT-B-16-SigLIP}\ntrain: {num_samples: 8, global_batch_size: 8}\n"
    )
    assert data_section(["run.yaml", "data.crop=center", "run.seed=3"]) == DataConfig(
        shards=str(tar_folder), captions={"json:class": 1}, crop="center"
    )
    with pytest.raises(ConfigError, match="only keys of the data section"):
        data_section(["a", "train.num_samples=3"])
    with pytest.raises(ConfigError, match="give the shards"):
        data_section(["data.crop=center"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{tmp}/none-*.tar"], "names no .tar file"),
        (["{tmp}/none.tar"], "{tmp}/none.tar: no such file"),
        (["{tars}", "data.image_kyes=[jpg]"], "did you mean 'image_keys'"),
        (["{tars}", "--sheet", "{tmp}/none/sheet.html"], "{tmp}/none does not exist"),
    ],
)
def test_bad_input_is_told(tar_folder, tmp_path, capsys, words, message):
    code, _, err = run(capsys, *(word.format(tmp=tmp_path, tars=tar_folder) for word in words))
    assert code == 2
    assert message.format(tmp=tmp_path) in err


def test_shard_named_twice_is_a_problem(tar_folder, capsys):
    code, out, _ = run(capsys, tar_folder, f"{tar_folder}/shard-000.tar")
    assert code == 2
    assert lines_with(out, "shard-000.tar", "named 2 times by the patterns")
    assert lines_with(out, "samples", "76")


def test_s3(tmp_path, capsys, monkeypatch):
    (path,) = write_dataset(tmp_path / "tars", [12])
    with s3_server(tmp_path) as variables:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            monkeypatch.delenv(name)
        endpoint = variables.pop("AWS_ENDPOINT_URL")
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        store = boto3.client("s3", endpoint_url=endpoint)
        store.upload_file(str(path), BUCKET, "tars/a.tar")
        store.put_object(Bucket=BUCKET, Key="tars/b.tar", Body=Path(path).read_bytes()[:3000])
        key = f"data.stores.s3_endpoint={endpoint}"
        code, out, _ = run(capsys, f"s3://{BUCKET}/tars/{{a,b,c}}.tar", key, "--all")
        assert code == 2
        assert lines_with(out, "3: 1 read whole, 2 that cannot be read to the end")
        assert lines_with(out, "b.tar", "cut short")
        assert lines_with(out, "c.tar", "no such object")
        store.delete_object(Bucket=BUCKET, Key="tars/b.tar")
        code, out, _ = run(capsys, f"s3://{BUCKET}/tars/", key)
        assert code == 0
        assert lines_with(out, "12 samples (100.0 %)")


@pytest.mark.parametrize("command", ["inspect", "audit", "tokenizer"])
def test_help_teaches_by_example(command, capsys):
    with pytest.raises(SystemExit) as exit_code:
        main(["data", command, "--help"])
    assert exit_code.value.code == 0
    assert f"examples:\n  sigray {'train' if command == 'audit' else 'data ' + command}" in capsys.readouterr().out
