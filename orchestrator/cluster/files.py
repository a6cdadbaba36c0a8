"""Cluster files, checked before anything is spent: `ray up` YAMLs of aws, gcp and local, and KubeRay manifests.

Ray's own preparation and schema come first. They let pass a machine that does not exist, an image or zone that cannot
be, eight chips on a host of four, a head that trains: the rest of this file looks for those, offline. What no one can
know offline: whether an image, a quota, a project or a network exists, and whether a zone has the machine.

Sources: Amazon's machine types, regions and the fields of an instance from botocore's description of EC2; Google's from
cloud.google.com/compute/docs/machine-resource, and for TPUs from cloud.google.com/tpu/docs and Ray's own tables.
"""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

import yaml

from sigray.orchestrator.config import ConfigError
from sigray.orchestrator.secrets import AMAZON_KEY, PRIVATE_KEY

RAY_VERSION = "2.60.0"
TRAINING, DATA = "training", "data"
"""Ray resources by which cluster files say what a node is for."""

# GPUs of Amazon's machine types; vCPUs follow from the size (4 for xlarge, 4 N for Nxlarge).
_AWS_GPUS = {
    "g4dn.xlarge": 1, "g4dn.2xlarge": 1, "g4dn.4xlarge": 1, "g4dn.8xlarge": 1, "g4dn.16xlarge": 1, "g4dn.12xlarge": 4,
    "g5.xlarge": 1, "g5.2xlarge": 1, "g5.4xlarge": 1, "g5.8xlarge": 1, "g5.16xlarge": 1, "g5.12xlarge": 4,
    "g5.24xlarge": 4, "g5.48xlarge": 8,
    "g6.xlarge": 1, "g6.2xlarge": 1, "g6.4xlarge": 1, "g6.8xlarge": 1, "g6.16xlarge": 1, "g6.12xlarge": 4,
    "g6.24xlarge": 4, "g6.48xlarge": 8,
    "g6e.xlarge": 1, "g6e.2xlarge": 1, "g6e.4xlarge": 1, "g6e.8xlarge": 1, "g6e.16xlarge": 1, "g6e.12xlarge": 4,
    "g6e.24xlarge": 4, "g6e.48xlarge": 8,
    "p3.2xlarge": 1, "p3.8xlarge": 4, "p3.16xlarge": 8, "p4d.24xlarge": 8, "p4de.24xlarge": 8, "p5.4xlarge": 1,
    "p5.48xlarge": 8, "p5e.48xlarge": 8, "p5en.48xlarge": 8,
}  # fmt: skip
_AWS_SIZES = {"medium": 1, "large": 2, "xlarge": 4}
_AWS_BURST = {"nano": 2, "micro": 2, "small": 2, "medium": 2, "large": 2}

_GCP_FAMILIES = ("e2", "n1", "n2", "n2d", "n4", "c2", "c2d", "c3", "c3d", "c4", "c4d", "t2d")
_GCP_SIZES = (1, 2, 4, 8, 16, 22, 30, 32, 44, 48, 60, 64, 80, 88, 90, 96, 112, 128, 176, 180, 192, 224, 360)
# vCPUs and GPUs of Google's machines that bring their GPUs along.
_GCP_GPUS = {
    **{f"a2-highgpu-{count}g": (12 * count, count) for count in (1, 2, 4, 8)},
    "a2-megagpu-16g": (96, 16),
    **{f"a2-ultragpu-{count}g": (12 * count, count) for count in (1, 2, 4, 8)},
    **{f"a3-highgpu-{count}g": (26 * count, count) for count in (1, 2, 4, 8)},
    "a3-megagpu-8g": (208, 8),
    "a3-ultragpu-8g": (224, 8),
    **{f"g2-standard-{cpus}": (cpus, gpus) for cpus, gpus in
       {4: 1, 8: 1, 12: 1, 16: 1, 24: 2, 32: 1, 48: 4, 96: 8}.items()},
}  # fmt: skip
_TPU_GENERATIONS = ("v2", "v3", "v4", "v5p", "v5litepod", "v6e")
_TPU_SINGLE_HOST = {"v5litepod": (1, 4, 8), "v6e": (1, 4, 8)}  # chips of slices that are one host
_TPU_PER_HOST = 4  # of all other slices
_GKE_TPU = {
    "tpu-v4-podslice": "v4",
    "tpu-v5-lite-podslice": "v5litepod",
    "tpu-v5p-slice": "v5p",
    "tpu-v6e-slice": "v6e",
}

_PLACEHOLDER = re.compile(r"YOUR-|REGISTRY|\b192\.0\.2\.|\b198\.51\.100\.|\b203\.0\.113\.")
_SECRETS = {
    "an Amazon access key": AMAZON_KEY,
    "a private key": PRIVATE_KEY,
    "a secret": re.compile(
        r"(?i)\b[\w-]*(secret_access_key|secret[_-]?key|password|passwd|api[_-]?key|hf_token|auth_token|wandb_key)"
        r"""["']?\s*[:=]\s*["']?(?!~|/|\$|\{|null\b)[^\s"',}]{6,}"""
    ),
}
# Ray 2.60 writes the whole runtime environment of a job to runtime_env_agent.log, at the level of information.
_LOG_LEVEL, _LOG_LEVEL_WHY = "RAY_LOGGER_LEVEL", "Ray's logs would hold the values that `sigray submit --env` passes"
_HEALTH = ("RAY_health_check_period_ms", "RAY_health_check_timeout_ms", "RAY_health_check_failure_threshold")


@dataclass
class ClusterCheck:
    """What a check found.

    Attributes:
        path: the file.
        kind: aws, gcp, local, RayCluster or RayJob.
        problems: one line each, with the place in the file.
        notes: what is still to fill in.
    """

    path: str
    kind: str = ""
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    groups: dict[str, tuple[dict[str, float], int]] = field(default_factory=dict)
    """Resources of a node of each type, and how many there can be."""

    def add(self, place: str, problem: str) -> None:
        self.problems.append(f"{place}: {problem}" if place else problem)


def check_cluster_file(path: str | Path) -> ClusterCheck:
    """Check one file; nothing is started and nothing is asked of any cloud.

    Raises:
        ConfigError: where the file cannot be read or is of an unknown kind.
    """
    try:
        text = Path(path).read_text()
        content = yaml.safe_load(text)
    except OSError as error:
        raise ConfigError(f"{path}: {(error.strerror or str(error)).lower()}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: a mapping expected")
    check = ClusterCheck(str(path))
    _check_secrets(text, check)
    for number, line in enumerate(text.splitlines(), 1):
        line = line.partition("#")[0] if line.lstrip().startswith("#") else line
        found = _PLACEHOLDER.search(line)
        if found and not line.lstrip().startswith("#"):
            check.notes.append(f"line {number}: fill in {line.strip().partition(' #')[0]}")
    if "apiVersion" in content:
        _check_manifest(content, check)
    else:
        _check_ray_yaml(content, check, Path(path))
    return check


def _check_secrets(text: str, check: ClusterCheck) -> None:
    for number, line in enumerate(text.splitlines(), 1):
        for what, pattern in _SECRETS.items():
            if pattern.search(line):
                check.add(f"line {number}", f"{what} in the file: give it by the environment, a role or a file mount")


# ---------------------------------------------------------------------------------------------------- ray up


def _check_ray_yaml(content: dict[str, Any], check: ClusterCheck, path: Path) -> None:
    provider = content.get("provider")
    if not isinstance(provider, dict) or provider.get("type") not in ("aws", "gcp", "local"):
        kind = provider.get("type") if isinstance(provider, dict) else provider
        raise ConfigError(f"{path}: provider.type={kind!r}: aws, gcp or local can be checked")
    check.kind = provider["type"]
    prepared = _prepare(content, check)
    if prepared is None:
        return
    _check_commands(content, prepared, check)
    _check_mounts(content, check)
    for name in ("aws_credentials", "gcp_credentials"):
        if name in provider:
            check.add(f"provider.{name}", "credentials in the file: use a role or the environment")
    if check.kind == "local":
        _check_local(content, check)
        return
    if not content.get("idle_timeout_minutes"):
        check.add("idle_timeout_minutes", "missing or 0: nodes that nobody uses must go")
    _check_zones(provider, check)
    head = prepared["head_node_type"]
    for name, group in prepared["available_node_types"].items():
        place, config, resources = f"available_node_types.{name}", group["node_config"], group["resources"]
        machine = _aws_machine(config, place, check) if check.kind == "aws" else _gcp_machine(config, place, check)
        if name == head:
            _check_head(resources, group, config, place, check)
        else:
            _check_resources(resources, machine, place, check)
            check.groups[name] = resources, int(group.get("max_workers", 0))
        if group.get("worker_setup_commands"):
            check.add(f"{place}.worker_setup_commands", "nodes of this type would have an environment of their own")
    offered = {resource for resources, _ in check.groups.values() for resource in resources}
    for role in (TRAINING, DATA):
        if role not in offered:
            check.add("available_node_types", f"no node offers the resource {role!r}, by which workers are placed")
    total = sum(group.get("max_workers", 0) for group in prepared["available_node_types"].values())
    if total > prepared["max_workers"]:
        check.add("max_workers", f"{prepared['max_workers']} is less than the {total} of all node types together")


def _prepare(content: dict[str, Any], check: ClusterCheck) -> dict[str, Any] | None:
    """Ray's own checks; None where they find something."""
    import copy
    import logging

    import click
    import jsonschema
    from ray.autoscaler._private.util import prepare_config, validate_config

    logging.getLogger("ray.autoscaler").setLevel(logging.ERROR)
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            prepared = prepare_config(copy.deepcopy(content))
            validate_config(prepared)
    except jsonschema.ValidationError as error:
        check.add(".".join(map(str, error.absolute_path)), f"{error.message} (Ray's schema)")
    except (ValueError, KeyError, RuntimeError, TypeError, AssertionError) as error:
        check.add("", f"{error} (Ray)")
    except (click.ClickException, SystemExit):
        check.add("", " ".join(said.getvalue().split()) + " (Ray)")
    else:
        return prepared
    return None


def _check_commands(content: dict[str, Any], prepared: dict[str, Any], check: ClusterCheck) -> None:
    for key in ("head_start_ray_commands", "worker_start_ray_commands"):
        commands = [command for command in content.get(key, []) if "ray start" in command]
        if not commands:
            check.add(key, "no `ray start` here: Ray's default would bind the dashboard to all addresses")
            continue
        command = " ".join(commands)
        if "RAY_AUTH_MODE=token" not in command:
            check.add(key, "RAY_AUTH_MODE=token is missing: whoever reaches a port could run code")
        if not re.search(rf"{_LOG_LEVEL}=(warning|error|critical)\b", command):
            check.add(key, f"{_LOG_LEVEL}=warning is missing: {_LOG_LEVEL_WHY}")
        if key.startswith("head"):
            for name in _HEALTH:
                if f"{name}=" not in command:
                    check.add(key, f"{name} is missing: a node cut off counts as alive for a minute")
            if not re.search(r"--num-cpus[= ]0\b", command):
                check.add(key, "--num-cpus=0 is missing: the head would train and decode")
            host = re.search(r"--dashboard-host[= ](\S+)", command)
            if host and host[1] not in ("127.0.0.1", "localhost", "::1"):
                check.add(
                    key, f"--dashboard-host={host[1]}: the dashboard belongs on 127.0.0.1; `ray dashboard` reaches it"
                )
        elif "$RAY_HEAD_IP" not in command:
            check.add(key, "--address=$RAY_HEAD_IP:PORT is missing: workers would not find the head")


def _check_mounts(content: dict[str, Any], check: ClusterCheck) -> None:
    mounts = content.get("file_mounts") or {}
    wanted = {"~/.ray/auth_token": "the token", "~/sigray/requirements.txt": "the pinned environment"}
    for place, what in wanted.items():
        if place not in mounts:
            check.add("file_mounts", f"{place} is missing: {what} of every node")
    for remote, local in mounts.items():
        if "auth_token" not in str(local) and not Path(str(local)).expanduser().exists():
            check.add(f"file_mounts.{remote}", f"{local} does not exist here (run from the top of the repository)")
    commands = content.get("setup_commands") or []
    if not any("clusters/setup.sh" in command for command in commands):
        check.add("setup_commands", "clusters/setup.sh is not run: nodes would not have the pinned environment")


def _check_local(content: dict[str, Any], check: ClusterCheck) -> None:
    provider = content["provider"]
    address = re.compile(r"^[A-Za-z0-9]([A-Za-z0-9.:-]*[A-Za-z0-9])?$")
    hosts = [provider.get("head_ip"), *provider.get("worker_ips", [])]
    for host in hosts:
        if not isinstance(host, str) or not address.match(host) or _is_bad_ip(host):
            check.add("provider", f"{host!r} is no address")
    if len(set(hosts)) < len(hosts):
        check.add("provider", "an address stands there twice")
    if content.get("max_workers", len(hosts) - 1) != len(hosts) - 1:
        check.add("max_workers", f"{content['max_workers']}, but there are {len(hosts) - 1} worker_ips")
    if not content.get("auth", {}).get("ssh_user"):
        check.add("auth.ssh_user", "missing")


def _is_bad_ip(host: str) -> bool:
    import ipaddress

    if not re.fullmatch(r"[0-9.]+", host):
        return False
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return True
    return False


def _check_head(
    resources: dict[str, Any], group: dict[str, Any], config: dict[str, Any], place: str, check: ClusterCheck
) -> None:
    for name in ("CPU", "GPU", "TPU", TRAINING, DATA):
        if resources.get(name):
            check.add(f"{place}.resources.{name}", f"{resources[name]}: the head only drives; 0, or left out")
    if "CPU" not in resources:
        check.add(f"{place}.resources.CPU", "missing: give 0, or Ray offers all of the head's")
    if group.get("max_workers"):
        check.add(f"{place}.max_workers", f"{group['max_workers']}: there is one head; 0")
    if _is_spot(config):
        check.add(f"{place}.node_config", "the head is preemptible: driver and controller would go with it")


def _is_spot(config: dict[str, Any]) -> bool:
    scheduling = _scheduling(config)
    market = config.get("InstanceMarketOptions") or {}
    return bool(
        scheduling.get("preemptible")
        or scheduling.get("spot")
        or scheduling.get("provisioningModel") == "SPOT"
        or market.get("MarketType") == "spot"
    )


def _scheduling(config: dict[str, Any]) -> dict[str, Any]:
    """Of a machine or a TPU; Ray's own examples give it as a list of one."""
    given: Any = config.get("scheduling") or config.get("schedulingConfig") or {}
    return dict(given[0]) if isinstance(given, list) else dict(given)


@dataclass(frozen=True)
class _Machine:
    """What a machine has; None: not known here."""

    name: str
    cpus: int | None = None
    gpus: int | None = None
    tpus: int = 0


def _check_resources(resources: dict[str, Any], machine: _Machine | None, place: str, check: ClusterCheck) -> None:
    if machine is None:
        return
    for name, has in (("CPU", machine.cpus), ("GPU", machine.gpus), ("TPU", machine.tpus)):
        if has is None:
            continue
        said = resources.get(name, 0)
        if said != has and (name != "CPU" or said > has):
            check.add(f"{place}.resources.{name}", f"{said}, but one node of {machine.name} has {has}")
    if not resources.get(TRAINING) and (machine.gpus or machine.tpus):
        check.add(f"{place}.resources.{TRAINING}", f"missing: {machine.name} is for training")


def _check_zones(provider: dict[str, Any], check: ClusterCheck) -> None:
    region, zones = str(provider.get("region", "")), str(provider.get("availability_zone", ""))
    if provider["type"] == "aws":
        if region not in _aws_regions():
            check.add("provider.region", f"{region!r} is no region of EC2")
        zone = re.compile(re.escape(region) + r"[a-f]$")
    else:
        if not re.fullmatch(r"[a-z]+-[a-z]+\d{1,2}", region):
            check.add("provider.region", f"{region!r} is no region of Google Cloud")
        if not provider.get("project_id"):
            check.add("provider.project_id", "missing")
        zone = re.compile(re.escape(region) + r"-[a-f]$")
    for name in zones.split(","):
        if not zone.match(name.strip()):
            check.add("provider.availability_zone", f"{name.strip()!r} is no zone of {region}")


@cache
def _ec2() -> Any:
    import botocore.session

    return botocore.session.Session().get_service_model("ec2")


def _aws_regions() -> frozenset[str]:
    import botocore.session

    return frozenset(botocore.session.Session().get_available_regions("ec2"))


def _aws_machine(config: dict[str, Any], place: str, check: ClusterCheck) -> _Machine | None:
    from botocore.validate import ParamValidator

    shape = _ec2().operation_model("RunInstances").input_shape
    report = ParamValidator().validate({"MinCount": 1, "MaxCount": 1, **config}, shape)
    if report.has_errors():
        for line in report.generate_report().splitlines():
            check.add(f"{place}.node_config", line)
    image, device = str(config.get("ImageId", "")), config.get("BlockDeviceMappings")
    if not re.fullmatch(r"ami-[0-9a-f]{8}([0-9a-f]{9})?|resolve:ssm:/\S+", image):
        check.add(
            f"{place}.node_config.ImageId",
            f"{image!r}: ami-... or resolve:ssm:/... expected (Ray's default is too old for torch 2.9)",
        )
    if not device:
        check.add(f"{place}.node_config.BlockDeviceMappings", "missing: the environment takes 10 GB, images give 8")
    name = str(config.get("InstanceType", ""))
    if name not in set(_ec2().shape_for("InstanceType").enum):
        check.add(f"{place}.node_config.InstanceType", f"{name!r} is no machine type of EC2")
        return None
    family, _, size = name.partition(".")
    cpus = _AWS_BURST.get(size) if family.startswith("t") else None
    cpus = cpus or _aws_cpus(size)
    if name == "p5.4xlarge":
        cpus = 16
    is_gpu = family[0] in "gp" and family[1:2].isdigit() and not family.startswith(("g3", "p2"))
    return _Machine(name, cpus, _AWS_GPUS.get(name) if is_gpu else 0)


def _aws_cpus(size: str) -> int | None:
    match = re.fullmatch(r"(\d+)xlarge", size)
    return 4 * int(match[1]) if match else _AWS_SIZES.get(size)


def _gcp_machine(config: dict[str, Any], place: str, check: ClusterCheck) -> _Machine | None:
    is_tpu = "acceleratorType" in config or "acceleratorConfig" in config
    if is_tpu and "machineType" not in config:
        return _tpu_machine(config, place, check)
    for disk in config.get("disks") or [{}]:
        image = str(disk.get("initializeParams", {}).get("sourceImage", "") if isinstance(disk, dict) else "")
        image_path = (
            r"(https://www\.googleapis\.com/compute/v1/)?projects/[a-z0-9-]+/global/images/(family/)?[a-z0-9-]+"
        )
        if not re.fullmatch(image_path, image):
            check.add(
                f"{place}.node_config.disks",
                f"sourceImage {image!r}: projects/PROJECT/global/images/family/NAME expected",
            )
    name = str(config.get("machineType", ""))
    if name in _GCP_GPUS:
        if str(_scheduling(config).get("onHostMaintenance", "")).upper() != "TERMINATE":
            check.add(f"{place}.node_config.scheduling", f"{name} has GPUs and needs onHostMaintenance: TERMINATE")
        return _Machine(name, *_GCP_GPUS[name])
    match = re.fullmatch(r"([a-z0-9]+)-(standard|highmem|highcpu)-(\d+)(-lssd)?", name)
    if not match or match[1] not in _GCP_FAMILIES or int(match[3]) not in _GCP_SIZES:
        check.add(
            f"{place}.node_config.machineType", f"{name!r} is no machine type of Compute Engine that is known here"
        )
        return None
    gpus = sum(int(one.get("acceleratorCount", 0)) for one in config.get("guestAccelerators") or [])
    return _Machine(name, int(match[3]), gpus)


def _tpu_machine(config: dict[str, Any], place: str, check: ClusterCheck) -> _Machine | None:
    from ray._private.accelerators import TPUAcceleratorManager

    if "acceleratorConfig" in config:
        check.add(f"{place}.node_config.acceleratorConfig", "give acceleratorType, as v4-16")
        return None
    name = str(config["acceleratorType"])
    generation, _, size = name.partition("-")
    if not TPUAcceleratorManager.is_valid_tpu_accelerator_type(name) or generation not in _TPU_GENERATIONS:
        check.add(
            f"{place}.node_config.acceleratorType",
            f"{name!r}: GENERATION-SIZE expected, with one of {', '.join(_TPU_GENERATIONS)}",
        )
        return None
    if not str(config.get("runtimeVersion", "")).startswith(("tpu-", "v2-alpha")):
        check.add(f"{place}.node_config.runtimeVersion", f"{config.get('runtimeVersion')!r}: as tpu-ubuntu2204-base")
    chips = tpu_chips(generation, int(size))
    if chips not in _tpu_sizes(generation):
        check.add(f"{place}.node_config.acceleratorType", f"{name!r}: no slice has {chips:g} chips")
        return None
    return _Machine(name, None, 0, tpus=chips_per_host(generation, int(chips)))


def tpu_chips(generation: str, size: int) -> float:
    """Chips of a slice such as v4-16 (8: the size counts cores, two a chip) or v6e-16 (16)."""
    return size / 1 if generation in _TPU_SINGLE_HOST else size / 2


def chips_per_host(generation: str, chips: int) -> int:
    """Chips that each host of a slice has."""
    return chips if chips in _TPU_SINGLE_HOST.get(generation, ()) else min(chips, _TPU_PER_HOST)


def _tpu_sizes(generation: str) -> frozenset[float]:
    multiples = range(4, 8961, 4) if generation in ("v4", "v5p") else (2**power for power in range(2, 11))
    return frozenset([*_TPU_SINGLE_HOST.get(generation, ()), *multiples])


# --------------------------------------------------------------------------------------------------- KubeRay

_CLUSTER_KEYS = {
    "rayVersion", "enableInTreeAutoscaling", "autoscalerOptions", "authOptions", "headGroupSpec", "workerGroupSpecs",
    "suspend", "managedBy", "headServiceAnnotations", "gcsFaultToleranceOptions",
}  # fmt: skip
_HEAD_KEYS = {"serviceType", "rayStartParams", "template", "enableIngress", "headService", "resources", "labels"}
_GROUP_KEYS = {
    "groupName", "replicas", "minReplicas", "maxReplicas", "numOfHosts", "idleTimeoutSeconds", "rayStartParams",
    "template", "suspend", "scaleStrategy", "resources", "labels",
}  # fmt: skip
_JOB_KEYS = {
    "entrypoint", "rayClusterSpec", "shutdownAfterJobFinishes", "ttlSecondsAfterFinished", "backoffLimit",
    "submissionMode", "runtimeEnvYAML", "activeDeadlineSeconds", "metadata", "clusterSelector", "entrypointNumCpus",
    "entrypointResources", "submitterPodTemplate", "suspend", "jobId", "deletionStrategy", "managedBy",
}  # fmt: skip
_CONTAINER_KEYS = {
    "name", "image", "imagePullPolicy", "command", "args", "env", "envFrom", "resources", "volumeMounts", "ports",
    "lifecycle", "securityContext", "livenessProbe", "readinessProbe", "startupProbe", "workingDir",
}  # fmt: skip


def _check_manifest(content: dict[str, Any], check: ClusterCheck) -> None:
    kind = str(content.get("kind"))
    if content["apiVersion"] != "ray.io/v1" or kind not in ("RayCluster", "RayJob"):
        raise ConfigError(f"{check.path}: {content['apiVersion']} {kind}: ray.io/v1 RayCluster or RayJob expected")
    check.kind = kind
    if not content.get("metadata", {}).get("name"):
        check.add("metadata.name", "missing")
    spec, place = content.get("spec") or {}, "spec"
    if kind == "RayJob":
        _check_keys(spec, _JOB_KEYS, place, check)
        if not str(spec.get("entrypoint", "")).startswith("sigray "):
            check.add("spec.entrypoint", f"{spec.get('entrypoint')!r}: a sigray command expected")
        if not spec.get("shutdownAfterJobFinishes"):
            check.add("spec.shutdownAfterJobFinishes", "not true: the cluster would stay and cost")
        spec, place = spec.get("rayClusterSpec") or {}, "spec.rayClusterSpec"
    _check_keys(spec, _CLUSTER_KEYS, place, check)
    if spec.get("rayVersion") != RAY_VERSION:
        check.add(f"{place}.rayVersion", f"{spec.get('rayVersion')!r}, but requirements.txt pins {RAY_VERSION}")
    if (spec.get("authOptions") or {}).get("mode") != "token":
        check.add(f"{place}.authOptions.mode", "not token: whoever reaches a port could run code")
    if spec.get("enableInTreeAutoscaling") and not (spec.get("autoscalerOptions") or {}).get("idleTimeoutSeconds"):
        check.add(f"{place}.autoscalerOptions.idleTimeoutSeconds", "missing: pods that nobody uses must go")
    _check_pods(spec, place, check)
    if not check.problems:
        _prepare_manifest(content["metadata"], spec, check)


def _check_pods(spec: dict[str, Any], place: str, check: ClusterCheck) -> None:
    images: dict[str, str] = {}
    head = spec.get("headGroupSpec") or {}
    _check_keys(head, _HEAD_KEYS, f"{place}.headGroupSpec", check)
    if head.get("serviceType", "ClusterIP") != "ClusterIP":
        check.add(f"{place}.headGroupSpec.serviceType", f"{head['serviceType']}: reachable from outside; ClusterIP")
    if str((head.get("rayStartParams") or {}).get("num-cpus")) != "0":
        check.add(f"{place}.headGroupSpec.rayStartParams.num-cpus", 'not "0": the head would train and decode')
    container = _container(head, f"{place}.headGroupSpec", check, images)
    names = {one.get("name") for one in container.get("env") or []}
    for name in _HEALTH:
        if name not in names:
            check.add(f"{place}.headGroupSpec", f"env {name} is missing: a pod cut off counts as alive for a minute")
    offered: set[str] = set()
    for number, group in enumerate(spec.get("workerGroupSpecs") or []):
        where = f"{place}.workerGroupSpecs.{group.get('groupName', number)}"
        _check_keys(group, _GROUP_KEYS, where, check)
        container = _container(group, where, check, images)
        _check_gke_tpu(group, container, where, check)
        params = {str(key): str(value) for key, value in (group.get("rayStartParams") or {}).items()}
        offered |= set(re.findall(r'\\?"(\w+)\\?"\s*:', params.get("resources", "")))
    for role in (TRAINING, DATA):
        if role not in offered:
            check.add(
                f"{place}.workerGroupSpecs", f"no group offers the resource {role!r}, by which workers are placed"
            )
    if len(set(images.values())) > 1:
        check.add(place, f"images differ, so environments do: {', '.join(sorted(set(images.values())))}")


def _container(group: dict[str, Any], place: str, check: ClusterCheck, images: dict[str, str]) -> dict[str, Any]:
    containers = ((group.get("template") or {}).get("spec") or {}).get("containers") or []
    if not containers:
        check.add(f"{place}.template.spec.containers", "missing")
        return {}
    container: dict[str, Any] = containers[0]
    _check_keys(container, _CONTAINER_KEYS, f"{place}.containers.0", check)
    image = images[place] = str(container.get("image", ""))
    if not re.fullmatch(r"\S+:[\w][\w.-]*|\S+@sha256:[0-9a-f]{64}", image) or image.endswith(":latest"):
        check.add(f"{place}.containers.0.image", f"{image!r} names no version: its environment is not pinned")
    levels = {one.get("value") for one in container.get("env") or [] if one.get("name") == _LOG_LEVEL}
    if not levels & {"warning", "error", "critical"}:
        check.add(f"{place}.env", f"{_LOG_LEVEL} is not warning: {_LOG_LEVEL_WHY}")
    for one in container.get("env") or []:
        if re.search(r"(?i)secret|password|token|access_key", str(one.get("name"))) and one.get("value"):
            check.add(f"{place}.env.{one['name']}", "a secret in the file: take it from a Secret (valueFrom)")
    return container


def _check_gke_tpu(group: dict[str, Any], container: dict[str, Any], place: str, check: ClusterCheck) -> None:
    limits = (container.get("resources") or {}).get("limits") or {}
    selector = ((group.get("template") or {}).get("spec") or {}).get("nodeSelector") or {}
    accelerator, topology = (selector.get(f"cloud.google.com/gke-tpu-{key}") for key in ("accelerator", "topology"))
    per_host, hosts = int(limits.get("google.com/tpu", 0)), int(group.get("numOfHosts", 1))
    if not per_host and accelerator is None:
        return
    if accelerator not in _GKE_TPU:
        check.add(f"{place}.nodeSelector", f"gke-tpu-accelerator {accelerator!r}: one of {', '.join(_GKE_TPU)}")
        return
    chips = prod(int(part) for part in re.findall(r"\d+", str(topology)))
    fits = chips_per_host(_GKE_TPU[accelerator], chips)
    if per_host != fits:
        check.add(f"{place}.limits", f"google.com/tpu: {per_host}, but a host of {accelerator} {topology} has {fits}")
    elif per_host * hosts != chips:
        check.add(
            f"{place}.numOfHosts", f"{hosts}, but a slice of {topology} has {chips // fits} hosts of {fits} chips"
        )


def _prepare_manifest(metadata: dict[str, Any], spec: dict[str, Any], check: ClusterCheck) -> None:
    """The config that Ray's autoscaler would derive from the manifest, by its own code."""
    from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
    from ray.autoscaler._private.util import validate_config

    resource = {"metadata": {"namespace": "default", **metadata}, "spec": spec}
    try:
        config = _derive_autoscaling_config_from_ray_cr(resource)
        validate_config(config)
    except Exception as error:  # Ray raises what it comes upon
        check.add("", f"{error} (Ray)")
        return
    for name, group in config["available_node_types"].items():
        if name != config["head_node_type"]:
            check.groups[name] = group["resources"], int(group["max_workers"])


def _check_keys(content: dict[str, Any], known: set[str], place: str, check: ClusterCheck) -> None:
    import difflib

    for key in content.keys() - known:
        near = difflib.get_close_matches(key, known, n=1)
        check.add(f"{place}.{key}", "unknown key" + (f"; did you mean {near[0]!r}?" if near else ""))


def report_lines(check: ClusterCheck) -> Iterator[str]:
    """What `sigray cluster check` prints."""
    verdict = "cannot be used" if check.problems else "ok"
    yield f"{check.path} ({check.kind}): {verdict}"
    yield from (f"  {problem}" for problem in check.problems)
    for name, (resources, most) in check.groups.items():
        shown = ", ".join(f"{amount:g} {key}" for key, amount in resources.items() if key != "memory" and amount)
        yield f"  {name}: up to {most} x ({shown})"
    yield from (f"  {note}" for note in check.notes)
