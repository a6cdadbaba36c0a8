"""The report page: right numbers in plain sentences, nothing fetched or unescaped, no hole where a file is missing."""

from __future__ import annotations

import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from sigray.orchestrator.config import ConfigError
from sigray.orchestrator.reports.run_page import write_report
from sigray.orchestrator.run.progress import figures_table
from tests.helpers.run_folders import (
    HOSTILE,
    OTHER,
    SET,
    SUMMARY,
    evaluation,
    metrics_line,
    retrieval,
    write_run,
    zero_shot,
)


class Page(HTMLParser):
    """The page's text with plain spaces, its tags, and every address that a browser would fetch."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self._parts: list[str] = []
        self.feed(self.source)
        self.text = re.sub(r"\s+", " ", " ".join(self._parts))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [
            value or "" for key, value in attrs if key in ("src", "href", "xlink:href", "srcset", "action")
        ]

    def handle_data(self, data: str) -> None:
        self._parts.append(data)


def page_of(folder: Path) -> Page:
    return Page(Path(write_report(folder)))


@pytest.fixture(scope="module")
def full_run(tmp_path_factory: pytest.TempPathFactory) -> Page:
    return page_of(write_run(tmp_path_factory.mktemp("demo")))


def test_full_run_says_what_came_out(full_run: Page) -> None:
    page = full_run
    assert (
        f"After 84,992 pairs (8.5 epochs) in 3 min 20 s, the model has the right name of 10.1 % of the {SET} images "
        "among its five best of 1,720 names: 35 times chance." in page.text
    )
    assert f"For {OTHER} it is 18.8 % among its five best of 180 names: 6.8 times chance." in page.text
    assert f"The first guess on {SET} is still below the pixel neighbour: 2.6 % are right." in page.text
    assert "Top-1 is 45 times chance, top-5 is 35 times chance. Below the pixel neighbour" in page.text
    assert "The pixel neighbour gets none right" in page.text
    assert "pixel neighbour 45.6 % chance 0.058 %" in page.text
    assert "20.0 % 34\u00d7 chance (0.58 %)" in page.text
    assert "1 of 4 shown is right at top-1; 2 have the right name among the five best." in page.text
    assert "No images were kept for this set." in page.text
    assert "caption: " not in page.text
    assert "the decoder writes" not in page.text
    for fact in (
        "256 pairs per step = 128 on each of 2 training workers",
        "332 of 332",
        "3 min 20 s training, 1 h 02 min in all",
        "2.0 M parameters, image tower 0.9 M, text tower 1.1 M",
        "10,022 pairs in 20 shards (47.2 MB)",
        "1.25 GiB in the first worker",
        "Xeon, 2 cores",
        "torch 2.9.1",
        "lr 0.001, schedule cosine, precision fp32, seed 7",
    ):
        assert fact in page.text
    assert "Not recorded" not in page.text
    assert page.tags.count("svg") == 7  # loss, two sets, logits, gradient norm, learning rate, throughput
    assert "Loss per image, lower is better: from 1 after 2,560 pairs to 0.03012." in page.text


def test_page_fetches_nothing_and_runs_nothing(full_run: Page) -> None:
    assert full_run.addresses
    assert all(address.startswith(("data:image/png;base64,", "#")) for address in full_run.addresses)
    assert not re.search(r"https?://|@import|url\((?!#)", full_run.source)
    assert not {"script", "link", "iframe", "object"} & set(full_run.tags)


def test_names_from_data_are_escaped(tmp_path: Path) -> None:
    done = [evaluation(332, 0.026, 0.1012)]
    done[0]["zero_shot"][HOSTILE] = zero_shot(0.5, 0.9, 20, 100)
    page = page_of(write_run(tmp_path, metrics=[], evaluations=done, summary=SUMMARY | {"name": HOSTILE}))
    assert "<script" not in page.source
    assert "&lt;script&gt;" in page.source
    assert "alert('x')" in page.text  # shown as the text that it is


def test_captions_of_a_decoder_stand_below_their_images(tmp_path: Path) -> None:
    done = evaluation(332, 0.026, 0.1012)
    png = done["sheets"][SET][0]["png_base64"]
    done["sheets"][SET][0] |= {"captions": ["own of a named image"], "caption": f"a {HOSTILE} in a tree"}
    done["sheets"]["unnamed"] = [
        {"png_base64": png, "captions": ["two ants", f"own {HOSTILE}"], "caption": "two bees"},
        {"png_base64": png, "captions": [], "caption": ""},
    ]
    page = page_of(write_run(tmp_path, metrics=[], evaluations=[done]))
    assert page.text.count("caption: ") == 3
    assert f"caption: a {HOSTILE} in a tree" in page.text
    assert f"two ants own {HOSTILE} caption: two bees caption: (empty)" in page.text
    assert "own of a named image" not in page.text
    assert "<script" not in page.source
    assert page.text.count("right at top-1") == 1, "images without names are not right or wrong"
    assert "The caption below an image is what the decoder writes" in page.text


def test_charts_take_their_colours_from_the_page_and_mix_no_ids(full_run: Page) -> None:
    charts = re.findall(r"<svg.*?</svg>", full_run.source, flags=re.DOTALL)
    assert len(charts) == 7
    assert all("var(--first)" in chart for chart in charts)
    assert not re.search(r"#0000\d\d", full_run.source)
    # An id may stand in two charts (a tick mark, a frame of the same size), but then it has to mean the same.
    defined = set(re.findall(r'<(?:path|clipPath) id="([mp][0-9a-f]{10})"[^>]*>\s*(?:<rect[^>]*>)?', full_run.source))
    meanings = re.findall(r'<(?:path|clipPath) id="[mp][0-9a-f]{10}"[^>]*>\s*(?:<rect[^>]*>)?', full_run.source)
    assert len(set(meanings)) == len(defined)
    assert set(re.findall(r"""(?:url\(|href=")#(\w+)""", full_run.source)) == defined


def test_same_run_gives_the_same_page(full_run: Page, tmp_path: Path) -> None:
    assert page_of(write_run(tmp_path)).source == full_run.source


def test_run_stopped_before_its_first_evaluation(tmp_path: Path) -> None:
    summary = SUMMARY | {"status": "stopped", "steps": 10, "samples_seen": 2560, "train_s": 8, "zero_shot": {}}
    page = page_of(write_run(tmp_path, metrics=[metrics_line(10)], evaluations=[], summary=summary))
    assert "Stopped after 2,560 of 84,992 pairs (0.3 epochs) in 8 s: no checkpoint was evaluated" in page.text
    assert "There is no evaluation in this run folder." in page.text
    assert "the only line of metrics" in page.text
    assert "No images were kept" in page.text
    assert page.tags.count("svg") == 5


def test_the_data_wait_is_a_share_of_the_time(tmp_path: Path) -> None:
    """10 s with 1 % and then 1 s with 50 %: 0.6 s of 11 s."""
    speeds = ((10, 256.0, 1.0), (11, 256.0, 50.0))
    lines = [
        metrics_line(step) | {"throughput/samples_per_s": rate, "data/wait_pct": wait} for step, rate, wait in speeds
    ]
    page = page_of(write_run(tmp_path, metrics=lines, evaluations=[], summary=None))
    assert "Training waited for data 5.5 % of 11 s in all." in page.text
    for tick in ("0 s", "3 s", "9 s"):  # the axis of time
        assert f" {tick} " in page.text


def test_a_loss_over_decades_has_plain_numbers(tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path, metrics=[metrics_line(step) for step in range(1, 400)], evaluations=[]))
    assert " 0.1 " in page.text
    assert "$" not in page.text


def test_run_without_a_summary_is_not_called_finished(tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path, metrics=[metrics_line(10)], evaluations=[], summary=None))
    # The config wants 84,900 pairs; whole steps make 84,992 of them.
    assert "Not finished after 2,560 of 84,992 pairs: no checkpoint was evaluated" in page.text
    assert "Not recorded" in page.text
    assert "hardware" in page.text


def test_summary_older_than_the_metrics_does_not_decide(tmp_path: Path) -> None:
    """A run that was stopped, resumed and then killed leaves the summary of an earlier attempt."""
    summary = SUMMARY | {"status": "stopped", "steps": 100, "samples_seen": 25600}
    page = page_of(
        write_run(tmp_path, metrics=[metrics_line(200)], evaluations=[evaluation(160, 0.01, 0.05)], summary=summary)
    )
    assert "Not finished after 51,200 of 84,992 pairs (5.1 epochs): the model has the right name of 5.0 %" in page.text
    assert "Measured on the checkpoint of step 160, after 40,960 pairs. The run continued for 10,240 more." in page.text
    assert "pixel neighbour 45.6 %" in page.text  # the baseline is the same for every checkpoint


def test_resumed_run_does_not_claim_the_time_of_its_last_session_for_the_whole(tmp_path: Path) -> None:
    summary = SUMMARY | {"facts": {**SUMMARY["facts"], "first_step": 160}}
    page = page_of(write_run(tmp_path, summary=summary))
    assert "After 84,992 pairs (8.5 epochs), the model" in page.text
    assert "3 min 20 s training, 1 h 02 min in all (last session)" in page.text
    assert "last resumed from the checkpoint of step 160" in page.text


def test_a_rate_within_luck_of_chance_is_called_so(tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path, metrics=[], evaluations=[evaluation(332, 0.001, 0.004)]))
    assert "among its five best of 1,720 names: no better than chance (0.29 %)." in page.text


def test_a_model_above_the_pixel_neighbour_is_called_so(tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path, metrics=[], evaluations=[evaluation(332, 0.6, 0.8)]))
    assert "Above the pixel neighbour" in page.text
    assert "still below the pixel neighbour" not in page.text


def test_set_without_classes_has_only_retrieval(tmp_path: Path) -> None:
    done = evaluation(332, 0.0, 0.0) | {"zero_shot": {}, "sheets": {}}
    page = page_of(write_run(tmp_path, metrics=[], evaluations=[done], summary=SUMMARY | {"zero_shot": {}}))
    assert (
        f"the model has the right caption of 20.0 % of the {SET} images among its ten closest: 34 times chance"
        in page.text
    )
    assert f"{SET} has no class names, so only retrieval is measured on it." in page.text


@pytest.mark.parametrize("kind", ["different", "equal", "measured before"])
def test_equal_captions_are_shown_merged_too(kind: str, tmp_path: Path) -> None:
    figures = retrieval(0.02, 1720, 1000 if kind == "equal" else None)
    if kind == "measured before":
        figures = {key: figures[key] for key in figures if "merged" not in key and "distinct" not in key}
    done = evaluation(332, 0.0, 0.0) | {"retrieval": {SET: figures}}
    page = page_of(write_run(tmp_path, metrics=[], evaluations=[done]))
    out = io.StringIO()
    Console(file=out, width=80).print(figures_table(done))
    printed = out.getvalue()
    shown = {
        "different": ("1,720 images, 1,720 captions", 0),
        "equal": ("1,720 images, 1,720 captions, 1,000 of them different", 2),
        "measured before": ("1,720 images, 1,720 captions, equal captions merged", 0),
    }
    assert shown[kind][0] in page.text.replace("\xa0", " ")
    assert len(re.findall("(text|image), equal captions merged", page.text)) == shown[kind][1]
    assert printed.count("image to text R@1 ") == (2 if kind == "equal" else 1)
    assert ("equal captions merged" in printed) == (kind != "different")


def test_figures_without_the_average_of_the_weights_stand_beside(tmp_path: Path) -> None:
    done = evaluation(332, 0.3, 0.6)
    last = evaluation(332, 0.217, 0.5)
    done["without_ema"] = {key: last[key] for key in ("zero_shot", "retrieval")}
    page = page_of(write_run(tmp_path, metrics=[], evaluations=[done]))
    out = io.StringIO()
    Console(file=out, width=80).print(figures_table(done))
    assert "with the average of the weights" in page.text
    assert re.search(f"Figures without EMA\\s+top-1 21.7 % of {SET}, top-1", page.text.replace("\xa0", " "))
    with_ema, without = out.getvalue().split("without EMA:")
    assert "30.00%" in with_ema
    assert "21.70%" in without


def test_few_classes_are_summed_up_by_the_first_guess(tmp_path: Path) -> None:
    done = evaluation(332, 0.0, 0.0) | {"zero_shot": {"pets": zero_shot(0.621, 1.0, 4, 200)}, "retrieval": {}}
    page = page_of(write_run(tmp_path, metrics=[], evaluations=[done]))
    assert "the right name of 62.1 % of the pets images as its first guess of 4 names: 2.5 times chance" in page.text
    assert "top-5 is" not in page.text
    assert "Retrieval was not measured." in page.text


def test_first_evaluation_with_no_hit_is_drawn_on_a_log_axis(tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path, metrics=[], evaluations=[evaluation(80, 0.0, 0.0), evaluation(332, 0.026, 0.1)]))
    assert page.tags.count("svg") == 2


def test_damaged_and_partial_files_are_named_and_left_out(tmp_path: Path) -> None:
    folder = write_run(tmp_path, evaluations=[evaluation(160, 0.01, 0.05)], summary={"zero_shot": None, "facts": []})
    (folder / "evaluations" / "step-0000000332.json").write_text('{"step": 33')
    (folder / "config.yaml").write_text("run: [")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 340, "samples_se')
    page = page_of(folder)
    assert "config.yaml is left out: not YAML: " in page.text
    assert "evaluations/step-0000000332.json is left out: not JSON: " in page.text
    assert "10.1 %" not in page.text
    assert "Not finished after 84,992 pairs: the model has the right name of 5.0 %" in page.text


@pytest.mark.parametrize("content", ["config", "metrics", "evaluations", "summary"])
def test_any_one_file_is_enough(tmp_path: Path, content: str) -> None:
    one: dict[str, Any] = {"config": None, "metrics": [], "evaluations": [], "summary": None}
    del one[content]
    page = page_of(write_run(tmp_path, **one))
    assert "What it ran on" in page.text
    assert "None" not in page.text
    assert "nan" not in page.text.split()


def test_what_is_no_run_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not a run"):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_languages_have_a_table_a_bar_each_and_a_sentence(tmp_path):
    def row(recall: float) -> dict[str, Any]:
        return {"retrieval": retrieval(recall, 1000), "zero_shot": zero_shot(recall, 5 * recall, 1000, 1000)}

    content = evaluation(10, 0.1, 0.3) | {"languages": {SET: {"en": row(0.2), "sw": row(0.01), "<b>": row(0.06)}}}
    (tmp_path / "evaluations").mkdir()
    (tmp_path / "evaluations" / "step-10.json").write_text(json.dumps(content))
    text = Path(write_report(tmp_path)).read_text()
    said = text.replace("\N{NO-BREAK SPACE}", " ")
    assert "over 3 languages: mean 9.0 %, from 1.0 % (sw) to 20.0 % (en); 2 of them at 50 times chance or more." in said
    assert "<b>" not in text.replace("&lt;b&gt;", "")
    table = text[text.index("Languages: ") :]
    svg = table[table.index("<svg") : table.index("</svg>")]
    places = [svg.index(f">{language}<") for language in ("en", "&lt;b&gt;", "sw")]
    assert places == sorted(places), "the highest bar first"
