"""`sigray config` and `sigray plan`."""

import json
from argparse import Namespace
from pathlib import Path

from rich.console import Console

from sigray.orchestrator.cli.command import CONFIG, OVERRIDES, argument, command, positive, positive_int
from sigray.orchestrator.config import ConfigError, RunConfig, load_config
from sigray.orchestrator.device_kinds import CPU, DEVICES


@command(
    argument("config", nargs="?", metavar="CONFIG.yaml"),
    OVERRIDES,
    argument("--schema", action="store_true", help="print the JSON schema, for completion in an editor"),
)
def config(options: Namespace, console: Console) -> None:
    """Print a config with every default written out, or the JSON schema.

    examples:
      sigray config examples/emoji_cpu.yaml optim.lr=5e-4
      sigray config --schema > sigray.schema.json

    docs/config.md explains each key.
    """
    if options.schema:
        print(json.dumps(RunConfig.model_json_schema(), indent=2))
    elif options.config:
        print(load_config(options.config, options.overrides).to_yaml(), end="")
    else:
        raise ConfigError("give a YAML file, or --schema")


@command(
    CONFIG,
    OVERRIDES,
    argument("--device", choices=[CPU, *DEVICES], help="cpu is this machine (default cluster.device)"),
    argument("--devices", type=positive_int, metavar="N", help="number of devices (default that of the config)"),
    argument("--price-per-hour", type=positive, metavar="X", help="price of one device"),
    argument("--json", action="store_true", help="print the plan as JSON"),
)
def plan(options: Namespace, console: Console) -> None:
    """Predict memory, time, bytes on the wire and cost of a run.

    examples:
      sigray plan examples/emoji_cpu.yaml                           on this machine
      sigray plan examples/siglip_b16_5days_32xtpu_v4.yaml          on the devices that the config names
      sigray plan my_run.yaml --device h100 --devices 8 --price-per-hour 3
      sigray plan my_run.yaml --device l4 train.micro_batch_size=256
      sigray plan examples/siglit_g14_4xtpu_v4.yaml embeddings.store=null     the locked tower in every step
      sigray plan my_run.yaml --json                                for programs

    Needs no cluster, no accelerator and no data; checks held-out sets and model.init_from if they are on this machine.
    docs/plan.md says what the plan counts, what it assumes, and how far it was off.

    Exit codes: 0 the run fits; 2 it does not fit, and the message names the train.micro_batch_size that would.
    """
    config = load_config(options.config, options.overrides)
    from sigray.orchestrator.planning.plan import check_fits, default_num_devices, plan, run_device, tables
    from sigray.orchestrator.run.preflight import check_model_config, with_inputs
    from sigray.workers.evaluation.set_checks import check_sets
    from sigray.workers.model.init_weights import check_initial_weights
    from sigray.workers.model.inputs import tokenizer_file
    from sigray.workers.model.tokenizer import is_plain

    device = options.device or run_device(config)
    if device is None:
        raise ConfigError("which device? Give --device or cluster.device: " + ", ".join([CPU, *DEVICES]))
    weights = config.model.init_from
    has_weights = weights is not None and Path(weights).exists()
    if weights is None or has_weights or (config.model.name is None and config.model.towers is None):
        config = with_inputs(config, lambda remark: None if options.json else console.print(remark, soft_wrap=True))
    tokenizer = tokenizer_file(config.model)
    # Without network, and without the file if it is elsewhere.
    is_here = is_plain(config.model) if tokenizer is None else Path(tokenizer).is_file()
    check_model_config(config, reads_tokenizer=is_here)
    check_sets(config.eval, config.data, only_here=True)
    if has_weights:
        check_initial_weights(config.model)
    num_devices = options.devices or default_num_devices(config, device)
    predicted = plan(config, device, num_devices, price_per_hour=options.price_per_hour)
    if options.json:
        print(json.dumps(predicted.as_dict(), indent=1))
    else:
        console.print(tables(predicted))
    check_fits(predicted, config)
