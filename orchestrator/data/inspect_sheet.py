"""Show an inspection: tables for the terminal, one HTML file with pictures."""

from __future__ import annotations

import contextlib
import statistics
import zlib
from array import array
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from rich.console import Group
from rich.table import Table
from rich.text import Text

from sigray.orchestrator.data.inspect import (
    BROKEN_PER_REASON,
    KEYS_PER_REASON,
    PICTURE_PX,
    Inspection,
    Picture,
    ShardFindings,
    open_url,
    patterns,
)
from sigray.orchestrator.formatting import byte_count
from sigray.orchestrator.reports.template import page, render
from sigray.orchestrator.tables import add, printable, rows_table, table
from sigray.workers.config import LINES, DataConfig, caption_member
from sigray.workers.data.decode import Refused, captions_at
from sigray.workers.data.tar import WHY_UNUSABLE, read_tar
from sigray.workers.storage import Storage

_MAX_ROWS = 20
_QUANTILES = {"least": 0.0, "5 %": 0.05, "median": 0.5, "95 %": 0.95, "most": 1.0}


def inspection_tables(found: Inspection) -> Group:
    """Return all findings for a terminal of 80 columns; the problems stand last."""
    tables = {"shards": rows_table(_overview(found).items())}
    if found.num_samples:
        tables["keys, of all samples read"] = _keys_table(found)
    if found.num_decoded:
        tables |= {"images": _formats_table(found), "image sizes": _sizes_table(found), **_captions_tables(found)}
    tables |= {
        "most frequent captions": _repeated_captions_table(found),
        "not used, of all that was read": _unusable_table(found),
        "duplicate keys": _duplicates_table(found),
        "broken samples, of those decoded": _broken_table(found),
        f"problems, {len(found.problems)}": _problems_table(found),
    }
    parts: list[Text | Table] = []
    for title, made in tables.items():
        if made.row_count:
            parts += [Text(title, style="bold"), made, Text()]
    return Group(*parts)


def _overview(found: Inspection) -> dict[str, str]:
    """Return the rows of the first table and of the sheet's head."""
    shards, whole = found.shards, found.whole
    num_bad = sum(bool(shard.problem) for shard in shards)
    num_part = sum(shard.is_opened and not shard.is_whole and not shard.problem for shard in shards)
    num_closed = len(shards) - len(whole) - num_bad - num_part
    others = {"in part": num_part, "not opened": num_closed, "that cannot be read to the end": num_bad}
    parts = [f"{len(whole):,} read whole", *(f"{count:,} {state}" for state, count in others.items() if count)]
    rows = {"shards": f"{len(shards):,}: {', '.join(parts)}", "samples": f"{found.num_samples:,}"}
    rows["bytes"] = byte_count(sum(shard.num_bytes_read for shard in shards))
    if whole:
        sizes = [shard.num_samples for shard in whole]
        spread = f"{min(sizes):,} least, {statistics.median(sizes):,g} median, {max(sizes):,} most"
        rows["samples per shard"] = spread if len(sizes) > 1 else f"{sizes[0]:,}"
        if num_part + num_closed:
            share = len(whole) / (len(shards) - num_bad)
            num_bytes = byte_count(sum(shard.num_bytes for shard in whole) / share)
            rows["estimate for all"] = f"{sum(sizes) / share:,.0f} samples, {num_bytes}"
    if found.num_samples:
        num_pairs = sum(shard.num_pairs for shard in shards)
        share_text = _percent(num_pairs, found.num_samples)
        rows["pairs"] = f"{num_pairs:,} samples ({share_text}) have an image and a caption member"
    for source in found.data.captions:
        captions = [shard.captions[source] for shard in shards if shard.captions]
        num_lined = sum(one.num_lined for one in captions)
        if num_lined > sum(one.num_present for one in captions) / 2 and caption_member(source) == source:
            rows[f"{source} of several lines"] = f"{num_lined:,} samples; {source}:{LINES} takes each line as a caption"
    rows["decoded"] = f"every sample, in {found.seconds:.1f} s"
    if found.num_decoded != found.num_samples or found.is_over_time:
        limit = ", until the time limit" * found.is_over_time
        selection = f"{found.num_decoded:,} samples, spread evenly over the samples read, in {found.seconds:.1f} s"
        rows["decoded"] = f"{selection}{limit}; --all reads and decodes everything"
    return rows


def _keys_table(found: Inspection) -> Table:
    endings: Counter[str] = sum((shard.endings for shard in found.shards), Counter())
    made = table(("ending", "left"), ("samples", "right"), ("share", "right"), ("used as", "left"))
    sources: dict[str, list[str]] = {}
    for source in found.data.captions:
        sources.setdefault(caption_member(source), []).append(source)
    for ending, count in endings.most_common(_MAX_ROWS):
        use = f"caption {', '.join(sources[ending])}" if ending in sources else ""
        use = "image" if ending in found.data.image_keys else use
        add(made, ending, f"{count:,}", _percent(count, found.num_samples), use)
    if len(endings) > _MAX_ROWS:
        add(made, f"and {len(endings) - _MAX_ROWS:,} more", "", "", "a key ends at its first dot")
    return made


def _formats_table(found: Inspection) -> Table:
    made = table(("format", "left"), ("in", "left"), ("samples", "right"), ("share", "right"))
    formats: Counter[tuple[str, str]] = sum((shard.formats for shard in found.shards), Counter())
    for (kind, ending), count in formats.most_common(_MAX_ROWS):
        add(made, kind, f".{ending}", f"{count:,}", _percent(count, formats.total()))
    return made


def _sizes_table(found: Inspection) -> Table:
    made = _quantiles_table("px, upright")
    names = ("heights", "widths", "image_bytes")
    heights, widths, sizes = (_joined(getattr(shard, name) for shard in found.shards) for name in names)
    if len(heights):
        _add_quantiles(made, "width", widths)
        _add_quantiles(made, "height", heights)
        _add_quantiles(made, "shorter side", np.minimum(widths, heights))
        _add_quantiles(made, "width / height", widths / heights, "{:.2f}")
        _add_quantiles(made, "file, kB", sizes / 1e3, "{:,.1f}")
    return made


def _captions_tables(found: Inspection) -> dict[str, Table]:
    made = table(
        ("source", "left"), ("weight", "right"), ("samples", "right"), ("share", "right"), ("texts", "right"),
        ("different", "right"), ("samples without", "left"),
    )  # fmt: skip
    lengths = _quantiles_table("per text")
    total_weight = sum(found.data.captions.values())
    for source, weight in found.data.captions.items():
        parts = [shard.captions[source] for shard in found.shards if shard.captions]
        num_present = sum(part.num_present for part in parts)
        hashes = _joined(part.hashes for part in parts)
        reasons: Counter[str] = sum((part.reasons for part in parts), Counter())
        missing = ", ".join(f"{reason}: {count:,}" for reason, count in reasons.most_common())
        shares = (_percent(weight, total_weight), f"{num_present:,}", _percent(num_present, found.num_decoded))
        add(made, source, *shares, f"{len(hashes):,}", f"{len(np.unique(hashes)):,}", missing)
        if len(hashes):
            _add_quantiles(lengths, f"{source}, characters", _joined(part.num_characters for part in parts))
            _add_quantiles(lengths, f"{source}, words", _joined(part.num_words for part in parts))
    return {"captions": made, "caption lengths": lengths}


def _repeated_captions_table(found: Inspection) -> Table:
    made = table(("times", "right"), ("source", "left"), ("caption", "left"))
    shards = [shard for shard in found.shards if shard.captions]
    for source in found.data.captions:
        hashes = _joined(shard.captions[source].hashes for shard in shards)
        if not len(hashes):
            continue
        _, first, counts = np.unique(hashes, return_index=True, return_counts=True)
        ends = np.cumsum([len(shard.captions[source].hashes) for shard in shards])
        for chosen in np.lexsort((first, -counts))[:5].tolist():
            if counts[chosen] > 1:
                number = int(np.searchsorted(ends, first[chosen], side="right"))
                shard = shards[number]
                place = shard.captions[source].places[int(first[chosen] - (ends[number - 1] if number else 0))]
                text = _read_caption(shard, place, source, int(hashes[first[chosen]]), found.data)
                add(made, f"{counts[chosen]:,}", source, printable(text, 200))
    return made


def _read_caption(shard: ShardFindings, place: int, source: str, hashed: int, data: DataConfig) -> str:
    """Read the caption with a hash again, from the sample at a byte of a shard."""
    try:
        with contextlib.closing(open_url(shard.url, data, place)) as tar:
            sample = next(read_tar(tar, allow_unclosed=data.allow_unclosed, links=shard.tally.links))
            texts = captions_at(source, sample.members)
    except (ValueError, OSError, StopIteration, Refused):
        return "(could not be read again)"
    return next((text for text in texts if hash(text) == hashed), "(changed meanwhile)")


def _unusable_table(found: Inspection) -> Table:
    """Return what training cannot use, whatever the config says."""
    made = table(("what", "left"), ("number", "right"), ("why, or the first", "left"))
    counts: Counter[str] = sum((Counter(shard.tally.unusable()) for shard in found.shards), Counter())
    for what, count in counts.most_common():
        add(made, what, f"{count:,}", WHY_UNUSABLE.get(what, ""))
    refused: dict[str, list[str]] = {}
    for shard in found.shards:
        for reason, keys in shard.refused_by_reader.items():
            refused.setdefault(reason, []).extend(f"{shard.name} {key}" for key in keys)
    for reason, keys in refused.items():
        add(made, f"samples refused: {reason}", f"{len(keys):,}", ", ".join(keys[:KEYS_PER_REASON]))
    return made


def _duplicates_table(found: Inspection) -> Table:
    made = table(("", "left"), ("samples", "right"), ("first", "left"))
    read = [shard for shard in found.shards if shard.tally.key_hashes]
    hashes = _joined(shard.tally.key_hashes for shard in read)
    if not len(hashes):
        return made
    sizes = [len(shard.tally.key_hashes) for shard in read]
    shards = np.repeat(np.arange(len(read)), sizes)
    order = np.argsort(hashes, kind="stable")  # equal keys of one shard are neighbours
    is_again = hashes[order][1:] == hashes[order][:-1]
    is_same_shard = shards[order][1:] == shards[order][:-1]
    for title, chosen in (
        ("key comes again in its shard", is_again & is_same_shard),
        ("key comes again in another shard", is_again & ~is_same_shard),
    ):
        numbers = np.sort(order[1:][chosen])
        if len(numbers):
            first = []
            for number in numbers[:KEYS_PER_REASON].tolist():
                place = int(shards[number])
                keys = zlib.decompress(read[place].keys).decode().split("\0")
                first.append(f"{read[place].name} {keys[number - sum(sizes[:place])]}")
            add(made, title, f"{len(numbers):,}", ", ".join(first))
    return made


def _broken_table(found: Inspection) -> Table:
    made = table(("reason", "left"), ("samples", "right"), ("share", "right"), ("first", "left"))
    counts, keys = found.refused()
    for reason, count in counts.most_common():
        add(made, reason, f"{count:,}", _percent(count, found.num_decoded), ", ".join(keys[reason]))
    return made


def _problems_table(found: Inspection) -> Table:
    made = table(("where", "left"), ("what", "left"))
    for place, problem in found.problems[:200]:
        add(made, place, problem)
    if len(found.problems) > 200:
        add(made, f"and {len(found.problems) - 200:,} more", "")
    return made


def _joined(parts: Iterable[array[int]]) -> np.ndarray:
    return np.concatenate([np.empty(0, np.int64), *(np.array(part, np.int64) for part in parts)])


def _quantiles_table(title: str) -> Table:
    return table((title, "left"), *((name, "right") for name in _QUANTILES))


def _add_quantiles(made: Table, title: str, values: np.ndarray, form: str = "{:,.0f}") -> None:
    add(made, title, *(form.format(value) for value in np.quantile(values, list(_QUANTILES.values()))))


def _percent(count: float, total: float) -> str:
    """(1, 3) -> '33.3 %', (2, 100000) -> '0.002 %'."""
    share = 100 * count / total
    return f"{share:.1f} %" if share >= 0.1 or not count else f"{share:.1g} %"


def write_sheet(found: Inspection, path: Path) -> None:
    """Write one HTML file that holds its pictures.

    Raises:
        OSError: if it cannot be written.
    """
    counts, _ = found.refused()
    every = [picture for shard in found.shards for picture in shard.broken]
    broken: list[Picture] = []
    for reason, _ in counts.most_common():
        broken += [picture for picture in every if picture.reason == reason][:BROKEN_PER_REASON]
    body = render(
        "sheet.html.j2",
        package="sigray.orchestrator.data",
        patterns=patterns(found.data),
        overview=_overview(found),
        problems=found.problems,
        pictures=[picture for shard in found.shards for picture in shard.pictures],
        broken=broken,
        counts=[(reason, f"{count:,}") for reason, count in counts.most_common()],
        num_decoded=found.num_decoded,
        crop=found.data.crop,
        px=PICTURE_PX,
    )
    Storage(path.parent).write(path.name, page(f"Data: {patterns(found.data)[0]}", body).encode())
