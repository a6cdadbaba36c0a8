"""`sigray data inspect`, `audit` and `tokenizer`."""

from argparse import Namespace
from pathlib import Path

from rich.console import Console

from sigray.orchestrator.cli.command import (
    OVERRIDES,
    RUN,
    argument,
    command,
    either,
    local,
    positive_int,
    progress_bars,
    say,
)
from sigray.orchestrator.config import ConfigError


@command(
    # Called "overrides", which also collects the words after an option.
    argument("overrides", nargs="+", metavar="PATTERN", help="shards or a run's CONFIG.yaml, and data.KEY=VALUE"),
    either(
        argument("--samples", type=positive_int, metavar="N", help="decode about N samples, without a time limit"),
        argument("--all", action="store_true", help="decode every sample, without a time limit"),
    ),
    argument("--sheet", type=local, metavar="FILE.html", help="write a page with pictures and captions"),
    usage="sigray data inspect PATTERN... [data.KEY=VALUE ...] [--samples N | --all] [--sheet FILE.html]",
)
def inspect(options: Namespace, console: Console) -> None:
    """Print the content of shards, and the problems in them.

    examples:
      sigray data inspect data/emoji36/train                        a folder
      sigray data inspect 'tars/train-{000000..000127}.tar' --sheet sheet.html
      sigray data inspect s3://bucket/prefix data.stores.s3_endpoint=http://127.0.0.1:9000
      sigray data inspect tars data.image_keys=[jpg] 'data.captions={txt: 1, json:captions.en: 3}'
      sigray data inspect examples/emoji_cpu.yaml --all             the data of a run, as the run reads it

    By default sigray decodes about 2,000 samples, spread evenly over all shards, and stops reading after 30 s; the
    output says what was not read. "Broken" is what training would refuse. Exit code 2 if shards are damaged, cut short
    or missing, or if training would not start or would stop; the last table gives the reasons.
    """
    from sigray.orchestrator.data.inspect import MAX_S, NUM_PICTURES, NUM_SAMPLES, data_section, inspect_data
    from sigray.orchestrator.data.inspect_sheet import inspection_tables, write_sheet

    data = data_section(options.overrides)
    sheet: Path | None = options.sheet
    if sheet is not None and not sheet.absolute().parent.is_dir():
        raise ConfigError(f"--sheet {sheet}: the folder {sheet.absolute().parent} does not exist")
    num_samples = None if options.all else options.samples or NUM_SAMPLES
    max_s = None if options.all or options.samples else MAX_S
    num_pictures = NUM_PICTURES if sheet else 0
    with progress_bars(console) as progress:
        found = inspect_data(data, num_samples=num_samples, max_s=max_s, num_pictures=num_pictures, progress=progress)
    console.print(inspection_tables(found))
    if sheet is not None:
        write_sheet(found, sheet)
        say(console, f"sheet: {sheet.absolute()}")
    if len(found.problems) == 1:
        raise ConfigError(": ".join(found.problems[0]))
    if found.problems:
        raise ConfigError(f"problems with the data, {len(found.problems)}: see the last table")


@command(RUN)
def audit(options: Namespace, console: Console) -> None:
    """Prove from a run's ledger that it used each sample once.

    examples:
      sigray train run.yaml train.ledger=true run.name=a            write down every pair that enters a loss
      sigray data audit runs/a
      sigray data audit s3://bucket/runs/a

    Exit codes: 0 every sample of each complete epoch was used exactly once, and every step had its pairs; 1 samples are
    missing or doubled, and the first of them are named; 2 the run has no ledger.
    """
    from sigray.orchestrator.run_folder import read_run

    config = read_run(options.run_folder)
    from sigray.orchestrator.data.audit import audit_run, audit_table

    found = audit_run(config)
    console.print(audit_table(found))
    if not found.audit.is_exact:
        raise RuntimeError(found.verdict)
    say(console, found.verdict)


@command(
    argument("pattern", metavar="PATTERN", help="shards, or a run's CONFIG.yaml"),
    argument("out", metavar="OUT.json", help="a file, or its URL in a store"),
    OVERRIDES,
    argument("--vocab-size", type=positive_int, default=8192, metavar="N", help="most tokens (default 8192)"),
    argument("--kind", choices=["bpe", "unigram"], default="bpe", help="default bpe"),
    argument("--keep-case", action="store_true", help="keep capital letters; the default is lower case"),
)
def tokenizer(options: Namespace, console: Console) -> None:
    """Train a tokenizer on the captions of shards.

    examples:
      sigray data tokenizer 'tars/*.tar' tokenizer.json --vocab-size 8000
      sigray data tokenizer tars world.json --kind unigram 'data.captions={json:captions.de: 1, json:captions.ja: 1}'
      sigray data tokenizer examples/emoji_cpu.yaml tokenizer.json  the captions of a run

    Every caption of every source in data.captions counts once; the weights do not matter. All captions are held in
    memory: if you have many, some shards are enough, such as 'train-{000000..000009}.tar'. Use bpe for languages that
    put spaces between words and have few different characters. unigram is for any languages, and has no unknown
    characters.
    """
    from sigray.orchestrator.data.inspect import data_section
    from sigray.orchestrator.data.train_tokenizer import train_caption_tokenizer

    data = data_section([options.pattern, *options.overrides])
    with progress_bars(console) as progress:
        made = train_caption_tokenizer(
            data,
            options.out,
            vocab_size=options.vocab_size,
            kind=options.kind,
            lower_case=not options.keep_case,
            progress=progress,
        )
    say(
        console,
        f"{made.path}: {made.vocab_size:,} tokens, from {made.num_captions:,} captions; "
        f"{made.num_unusable:,} samples without a usable one",
        f"tokens per caption, the closing [EOS] included: median {made.tokens_median:.0f}, "
        f"95th percentile {made.tokens_95_pct:.0f}\n",
        made.yaml,
    )
