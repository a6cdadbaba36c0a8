"""Check cluster files: `ray up` YAMLs of aws, gcp and local, KubeRay manifests.

All checks are offline. Ray's own preparation and schema come first. They accept an image or a zone that cannot exist,
eight chips on a host of four, and a head that trains; the rest of this file finds those. It keeps no table of a cloud's
machines. Names of Amazon's machine types, regions and fields come from botocore, TPU slices from Ray. Numbers that a
name contains are compared: n2-standard-16 has 16 CPUs, a2-highgpu-1g has one GPU.

Only the cloud knows which images, quotas, projects and networks exist, and which machines a zone has.
"""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from sigray.orchestrator.config import ConfigError, parse_mapping, read_file
from sigray.orchestrator.secrets import AMAZON_KEY, PRIVATE_KEY

RAY_VERSION = "2.60.0"
TRAINING, DATA = "training", "data"
"""Ray resources of cluster files: what a node is for."""

# Names that the files here have, others that people leave in a template, and names and addresses of RFC 2606 and 5737.
_PLACEHOLDER = re.compile(
    r"(?i)\b(your|my)[-_](project|bucket|registry|host|user|key|account|org)|\bYOUR-|\bchange[-_]?me\b|<[a-z][^<>]*>"
    r"|\bexample\.(com|net|org)\b|(?-i:\bREGISTRY\b)|\b(192\.0\.2|198\.51\.100|203\.0\.113)\.\d"
)
_SECRETS = {
    "an Amazon access key": AMAZON_KEY,
    "a private key": PRIVATE_KEY,
    "a secret": re.compile(
        r"(?i)\b[\w-]*(secret_access_key|secret[_-]?key|password|passwd|api[_-]?key|hf_token|auth_token|wandb_key)"
        r"""["']?\s*[:=]\s*["']?(?!~|/|\$|\{|null\b)[^\s"',}]{6,}"""
    ),
}
# At log level info, Ray 2.60 writes a job's whole runtime environment to runtime_env_agent.log.
_LOG_LEVEL, _LOG_LEVEL_WHY = "RAY_LOGGER_LEVEL", "Ray's logs would hold the values that `sigray submit --env` passes"
_NO_TOKEN_WHY = "any client that reaches a port could run code"
_HEALTH = ("RAY_health_check_period_ms", "RAY_health_check_timeout_ms", "RAY_health_check_failure_threshold")


@dataclass
class ClusterCheck:
    """What a check found.

    Attributes:
        kind: aws, gcp, local, RayCluster or RayJob.
        problems: one line each, with the place in the file.
        placeholders: lines that are still to be filled in; the file is right otherwise.
        groups: Ray resources of a node of each type, and the most nodes of that type.
    """

    path: str
    kind: str = ""
    problems: list[str] = field(default_factory=list)
    placeholders: list[str] = field(default_factory=list)
    groups: dict[str, tuple[dict[str, float], int]] = field(default_factory=dict)

    def add(self, place: str, problem: str) -> None:
        self.problems.append(f"{place}: {problem}" if place else problem)

    def add_if(self, is_wrong: object, place: str, problem: str) -> None:
        if is_wrong:
            self.add(place, problem)


def check_cluster_file(path: str | Path) -> ClusterCheck:
    """Check one file, without starting anything and without calls to a cloud.

    Raises:
        ConfigError: the file cannot be read or is of an unknown kind.
    """
    text = read_file(path)
    content = parse_mapping(text, str(path), "a mapping expected")
    check = ClusterCheck(str(path))
    for number, line in enumerate(text.decode().splitlines(), 1):
        for what, pattern in _SECRETS.items():
            if pattern.search(line):
                check.add(f"line {number}", f"{what} in the file: use the environment, a role or a file mount")
        value = re.split(r"(?:^|\s)#", line)[0]
        if _PLACEHOLDER.search(value):
            check.placeholders.append(f"line {number}: fill in {value.strip()}")
    try:
        if "apiVersion" in content:
            _check_manifest(content, check)
        else:
            _check_ray_yaml(content, check, Path(path))
    except (AttributeError, TypeError, LookupError, ArithmeticError) as error:
        raise ConfigError(f"{path}: a value is of another type than Ray or Kubernetes reads: {error}") from error
    return check


# ---------------------------------------------------------------------------------------------------- ray up


def _check_ray_yaml(content: dict[str, Any], check: ClusterCheck, path: Path) -> None:
    given = content.get("provider")
    provider = given if isinstance(given, dict) else {}
    check.kind = str(provider.get("type"))
    if check.kind not in ("aws", "gcp", "local"):
        raise ConfigError(f"{path}: provider.type={check.kind}: expected aws, gcp or local")
    prepared = _prepare(content, check)
    if prepared is None:
        return
    _check_commands(content, check)
    _check_mounts(content, check)
    for name in sorted(provider.keys() & {"aws_credentials", "gcp_credentials"}):
        check.add(f"provider.{name}", "credentials in the file: use a role or the environment")
    if check.kind == "local":
        _check_local(content, check)
        return
    if not content.get("idle_timeout_minutes"):
        check.add("idle_timeout_minutes", "missing or 0: idle nodes must end")
    _check_zones(provider, check)
    check_machine = _check_aws if check.kind == "aws" else _check_gcp
    for name, group in prepared["available_node_types"].items():
        place = f"available_node_types.{name}"
        check_machine(group["node_config"], group["resources"], place, check)
        if name == prepared["head_node_type"]:
            _check_head(group, place, check)
        else:
            if group["resources"].keys() & {"GPU", "TPU"} and not group["resources"].get(TRAINING):
                check.add(f"{place}.resources.{TRAINING}", "missing: a node with accelerators is for training")
            check.groups[name] = group["resources"], int(group.get("max_workers", 0))
        if group.get("worker_setup_commands"):
            check.add(f"{place}.worker_setup_commands", "nodes of this type would have an environment of their own")
    _check_roles({name for resources, _ in check.groups.values() for name in resources}, "available_node_types", check)
    total = sum(group.get("max_workers", 0) for group in prepared["available_node_types"].values())
    if total > prepared["max_workers"]:
        check.add("max_workers", f"{prepared['max_workers']} is less than the {total} of all node types together")


def _check_roles(offered: set[str], place: str, check: ClusterCheck) -> None:
    for role in (TRAINING, DATA):
        check.add_if(role not in offered, place, f"no node offers the resource {role!r}, by which workers are placed")


def _prepare(content: dict[str, Any], check: ClusterCheck) -> dict[str, Any] | None:
    """Run Ray's own checks; None if they find a problem."""
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


def _check_commands(content: dict[str, Any], check: ClusterCheck) -> None:
    for key in ("head_start_ray_commands", "worker_start_ray_commands"):
        commands = [command for command in content.get(key, []) if "ray start" in command]
        if not commands:
            check.add(key, "no `ray start` here: Ray's default would bind the dashboard to all addresses")
            continue
        command = " ".join(commands)
        check.add_if("RAY_AUTH_MODE=token" not in command, key, f"RAY_AUTH_MODE=token is missing: {_NO_TOKEN_WHY}")
        is_quiet = re.search(rf"{_LOG_LEVEL}=(warning|error|critical)\b", command)
        check.add_if(not is_quiet, key, f"{_LOG_LEVEL}=warning is missing: {_LOG_LEVEL_WHY}")
        if key.startswith("head"):
            for name in (name for name in _HEALTH if f"{name}=" not in command):
                check.add(key, f"{name} is missing: an unreachable node counts as alive for a minute")
            if not re.search(r"--num-cpus[= ]0\b", command):
                check.add(key, "--num-cpus=0 is missing: the head would train and decode")
            host = re.search(r"--dashboard-host[= ](\S+)", command)
            if host and host[1] not in ("127.0.0.1", "localhost", "::1"):
                check.add(key, f"--dashboard-host={host[1]}: use 127.0.0.1 and `ray dashboard`")
        elif "$RAY_HEAD_IP" not in command:
            check.add(key, "--address=$RAY_HEAD_IP:PORT is missing: workers would not find the head")


def _check_mounts(content: dict[str, Any], check: ClusterCheck) -> None:
    mounts = content.get("file_mounts") or {}
    for place in ("~/.ray/auth_token", "~/sigray/requirements.txt", "~/sigray/src"):
        check.add_if(place not in mounts, "file_mounts", f"{place} is missing: every node needs it")
    for remote, local in mounts.items():
        if "auth_token" not in str(local) and not Path(str(local)).expanduser().exists():
            check.add(f"file_mounts.{remote}", f"{local} does not exist here (run from the top of the repository)")
    commands = content.get("setup_commands") or []
    if not any("clusters/setup.sh" in command for command in commands):
        check.add("setup_commands", "clusters/setup.sh does not run: nodes would not have the pinned environment")


def _check_local(content: dict[str, Any], check: ClusterCheck) -> None:
    provider = content["provider"]
    hosts = [provider.get("head_ip"), *provider.get("worker_ips", [])]
    for host in hosts:
        check.add_if(not _is_address(str(host)), "provider", f"{host!r} is no address")
    check.add_if(len(set(hosts)) < len(hosts), "provider", "an address stands there twice")
    num_workers = len(hosts) - 1
    most = content.get("max_workers", num_workers)
    check.add_if(most != num_workers, "max_workers", f"{most}, but there are {num_workers} worker_ips")
    check.add_if(not content.get("auth", {}).get("ssh_user"), "auth.ssh_user", "missing")


def _is_address(host: str) -> bool:
    if re.fullmatch(r"[0-9.]+", host):
        return host != "0.0.0.0" and bool(re.fullmatch(r"((25[0-5]|2[0-4]\d|1?\d?\d)(\.(?=\d)|$)){4}", host))
    return host != "None" and bool(re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9.:-]*[A-Za-z0-9])?", host))


def _check_head(group: dict[str, Any], place: str, check: ClusterCheck) -> None:
    config, resources = group["node_config"], group["resources"]
    for name in ("CPU", "GPU", "TPU", TRAINING, DATA):
        if resources.get(name):
            check.add(f"{place}.resources.{name}", f"{resources[name]}: the head only drives; set 0 or leave it out")
    if "CPU" not in resources:
        check.add(f"{place}.resources.CPU", "missing: set 0, or Ray offers all CPUs of the head")
    if group.get("max_workers"):
        check.add(f"{place}.max_workers", f"{group['max_workers']}: a cluster has one head; set 0")
    scheduling = _scheduling(config)
    is_spot = (config.get("InstanceMarketOptions") or {}).get("MarketType") == "spot"
    if is_spot or scheduling.get("preemptible") or scheduling.get("spot") or "SPOT" in scheduling.values():
        check.add(f"{place}.node_config", "the head is preemptible: its preemption would end driver and controller")


def _scheduling(config: dict[str, Any]) -> dict[str, Any]:
    """Return the scheduling of a machine or TPU; Ray's examples have a list of one."""
    given: Any = config.get("scheduling") or config.get("schedulingConfig") or {}
    return dict(given[0]) if isinstance(given, list) else dict(given)


def _check_zones(provider: dict[str, Any], check: ClusterCheck) -> None:
    region = str(provider.get("region", ""))
    if provider["type"] == "aws":
        if region not in _botocore().get_available_regions("ec2"):
            check.add("provider.region", f"{region!r} is no region of EC2")
    else:
        if not re.fullmatch(r"[a-z]+-[a-z]+\d{1,2}", region):
            check.add("provider.region", f"{region!r} is no region of Google Cloud")
        check.add_if(not provider.get("project_id"), "provider.project_id", "missing")
    pattern = re.escape(region) + ("[a-f]" if provider["type"] == "aws" else "-[a-f]")
    for name in str(provider.get("availability_zone", "")).split(","):
        if not re.fullmatch(pattern, name.strip()):
            check.add("provider.availability_zone", f"{name.strip()!r} is no zone of {region}")


@cache
def _botocore() -> Any:
    import botocore.session

    return botocore.session.Session()


def _check_aws(config: dict[str, Any], resources: dict[str, Any], place: str, check: ClusterCheck) -> None:
    from botocore.validate import ParamValidator

    ec2 = _botocore().get_service_model("ec2")
    shape = ec2.operation_model("RunInstances").input_shape
    report = ParamValidator().validate({"MinCount": 1, "MaxCount": 1, **config}, shape)
    for line in report.generate_report().splitlines():
        check.add(f"{place}.node_config", line)
    image = str(config.get("ImageId", ""))
    if not re.fullmatch(r"ami-[0-9a-f]{8}([0-9a-f]{9})?|resolve:ssm:/\S+", image):
        why = "expected ami-... or resolve:ssm:/... (Ray's default image is too old for torch 2.9)"
        check.add(f"{place}.node_config.ImageId", f"{image!r}: {why}")
    if not config.get("BlockDeviceMappings"):
        check.add(f"{place}.node_config.BlockDeviceMappings", "missing: the environment takes 10 GB, images have 8 GB")
    name = str(config.get("InstanceType", ""))
    if name not in ec2.shape_for("InstanceType").enum:
        check.add(f"{place}.node_config.InstanceType", f"{name!r} is no machine type of EC2")
    if size := re.search(r"\.(\d*)xlarge$", name):
        _check_most("CPU", 4 * int(size[1] or 1), name, resources, place, check)


def _check_most(key: str, most: int, name: str, resources: dict[str, Any], place: str, check: ClusterCheck) -> None:
    if resources.get(key, 0) > most:
        check.add(f"{place}.resources.{key}", f"{resources[key]}, but one node of {name} has {most}")


def _check_gcp(config: dict[str, Any], resources: dict[str, Any], place: str, check: ClusterCheck) -> None:
    if ("acceleratorType" in config or "acceleratorConfig" in config) and "machineType" not in config:
        _check_tpu(config, resources, place, check)
        return
    pattern = r"(https://www\.googleapis\.com/compute/v1/)?projects/[a-z0-9-]+/global/images/(family/)?[a-z0-9-]+"
    for disk in config.get("disks") or [{}]:
        image = str(disk.get("initializeParams", {}).get("sourceImage", "") if isinstance(disk, dict) else "")
        if not re.fullmatch(pattern, image):
            why = "expected projects/PROJECT/global/images/family/NAME"
            check.add(f"{place}.node_config.disks", f"sourceImage {image!r}: {why}")
    name = str(config.get("machineType", ""))
    size = re.fullmatch(r"[a-z]+\d+[a-z]*-[a-z]+(?:-(\d+)(g?).*)?", name)
    if not size:
        check.add(f"{place}.node_config.machineType", f"{name!r}: expected FAMILY-CLASS-SIZE, as n2-standard-16")
    elif size[1]:
        _check_most("GPU" if size[2] else "CPU", int(size[1]), name, resources, place, check)
    if resources.get("GPU") and str(_scheduling(config).get("onHostMaintenance", "")).upper() != "TERMINATE":
        check.add(f"{place}.node_config.scheduling", "a machine with GPUs needs onHostMaintenance: TERMINATE")


def _check_tpu(config: dict[str, Any], resources: dict[str, Any], place: str, check: ClusterCheck) -> None:
    from ray._private.accelerators import tpu

    if "acceleratorConfig" in config:
        check.add(f"{place}.node_config.acceleratorConfig", "use acceleratorType, as v4-16")
        return
    name = str(config["acceleratorType"])
    runtime = str(config.get("runtimeVersion", ""))
    if not runtime.startswith(("tpu-", "v2-alpha")):
        check.add(f"{place}.node_config.runtimeVersion", f"{runtime!r}: expected one such as tpu-ubuntu2204-base")
    generation = name.partition("-")[0]
    topologies = tpu.VALID_TPU_TOPOLOGY.get(generation, set())
    one_host = {"2x2"} if topologies else set()  # which Ray's table lacks for v2 and v3
    known = {tpu.infer_tpu_pod_type_from_topology(topology, generation) for topology in topologies | one_host}
    if name not in known:
        check.add(f"{place}.node_config.acceleratorType", f"{name!r} is no TPU slice that Ray {RAY_VERSION} knows")
        return
    chips = tpu.get_num_tpu_visible_chips_per_host(name)
    if resources.get("TPU", 0) != chips:
        check.add(f"{place}.resources.TPU", f"{resources.get('TPU', 0)}, but one node of {name} has {chips}")


# --------------------------------------------------------------------------------------------------- KubeRay


def _check_manifest(content: dict[str, Any], check: ClusterCheck) -> None:
    kind = str(content.get("kind"))
    if content["apiVersion"] != "ray.io/v1" or kind not in ("RayCluster", "RayJob"):
        raise ConfigError(f"{check.path}: {content['apiVersion']} {kind}: expected ray.io/v1 RayCluster or RayJob")
    check.kind = kind
    check.add_if(not content.get("metadata", {}).get("name"), "metadata.name", "missing")
    place = "spec"
    spec = content.get("spec") or {}
    if kind == "RayJob":
        if not str(spec.get("entrypoint", "")).startswith("sigray "):
            check.add("spec.entrypoint", f"{spec.get('entrypoint')!r}: expected a sigray command")
        if not spec.get("shutdownAfterJobFinishes"):
            check.add("spec.shutdownAfterJobFinishes", "not true: the cluster would stay up")
        place = "spec.rayClusterSpec"
        spec = spec.get("rayClusterSpec") or {}
    if spec.get("rayVersion") != RAY_VERSION:
        check.add(f"{place}.rayVersion", f"{spec.get('rayVersion')!r}, but requirements.txt pins {RAY_VERSION}")
    mode = (spec.get("authOptions") or {}).get("mode")
    check.add_if(mode != "token", f"{place}.authOptions.mode", f"not token: {_NO_TOKEN_WHY}")
    if spec.get("enableInTreeAutoscaling") and not (spec.get("autoscalerOptions") or {}).get("idleTimeoutSeconds"):
        check.add(f"{place}.autoscalerOptions.idleTimeoutSeconds", "missing: idle pods must end")
    _check_pods(spec, place, check)
    if not check.problems:
        _prepare_manifest(content["metadata"], spec, check)


def _check_pods(spec: dict[str, Any], place: str, check: ClusterCheck) -> None:
    place_of_head = f"{place}.headGroupSpec"
    head = spec.get("headGroupSpec") or {}
    if head.get("serviceType", "ClusterIP") != "ClusterIP":
        check.add(f"{place_of_head}.serviceType", f"{head['serviceType']} is reachable from outside; use ClusterIP")
    if str((head.get("rayStartParams") or {}).get("num-cpus")) != "0":
        check.add(f"{place_of_head}.rayStartParams.num-cpus", 'not "0": the head would train and decode')
    container = _container(head, place_of_head, check)
    for name in (name for name in _HEALTH if name not in _environment(container)):
        check.add(place_of_head, f"env {name} is missing: an unreachable pod counts as alive for a minute")
    images = {str(container.get("image"))}
    offered: set[str] = set()
    for number, group in enumerate(spec.get("workerGroupSpecs") or []):
        where = f"{place}.workerGroupSpecs.{group.get('groupName', number)}"
        container = _container(group, where, check)
        images.add(str(container.get("image")))
        _check_gke_tpu(group, container, where, check)
        resources = str((group.get("rayStartParams") or {}).get("resources", ""))
        offered |= set(re.findall(r'\\?"(\w+)\\?"\s*:', resources))
    _check_roles(offered, f"{place}.workerGroupSpecs", check)
    check.add_if(len(images) > 1, place, f"images differ, so environments differ: {', '.join(sorted(images))}")


def _container(group: dict[str, Any], place: str, check: ClusterCheck) -> dict[str, Any]:
    containers = ((group.get("template") or {}).get("spec") or {}).get("containers") or []
    if not containers:
        check.add(f"{place}.template.spec.containers", "missing")
        return {}
    image = str(containers[0].get("image", ""))
    if not re.fullmatch(r"\S+:[\w][\w.-]*|\S+@sha256:[0-9a-f]{64}", image) or image.endswith(":latest"):
        check.add(f"{place}.containers.0.image", f"{image!r} names no version: its environment is not pinned")
    environment = _environment(containers[0])
    if environment.get(_LOG_LEVEL) not in ("warning", "error", "critical"):
        check.add(f"{place}.env", f"{_LOG_LEVEL} is not warning: {_LOG_LEVEL_WHY}")
    for name, value in environment.items():
        if re.search(r"(?i)secret|password|token|access_key", name) and value:
            check.add(f"{place}.env.{name}", "a secret in the file: use a Secret (valueFrom)")
    return dict(containers[0])


def _environment(container: dict[str, Any]) -> dict[str, Any]:
    return {str(one.get("name")): one.get("value") for one in container.get("env") or []}


def _check_gke_tpu(group: dict[str, Any], container: dict[str, Any], place: str, check: ClusterCheck) -> None:
    from ray._private.accelerators import tpu
    from ray.autoscaler._private.kuberay.utils import tpu_node_selectors_to_type

    limits = (container.get("resources") or {}).get("limits") or {}
    selector = ((group.get("template") or {}).get("spec") or {}).get("nodeSelector") or {}
    accelerator, topology = (selector.get(f"cloud.google.com/gke-tpu-{key}") for key in ("accelerator", "topology"))
    per_host, hosts = int(limits.get("google.com/tpu", 0)), int(group.get("numOfHosts", 1))
    if not per_host and accelerator is None:
        return
    slice_type = tpu_node_selectors_to_type(str(topology), str(accelerator))
    if slice_type is None:
        check.add(f"{place}.nodeSelector", f"{accelerator!r} {topology!r} is no TPU slice that Ray {RAY_VERSION} knows")
        return
    fits = tpu.get_num_tpu_visible_chips_per_host(slice_type)
    wanted = tpu.get_total_chips_from_accelerator_type(slice_type) // fits
    if per_host != fits:
        check.add(f"{place}.limits", f"google.com/tpu: {per_host}, but a host of {accelerator} {topology} has {fits}")
    elif hosts != wanted:
        check.add(f"{place}.numOfHosts", f"{hosts}, but a slice of {topology} has {wanted} hosts of {fits} chips")


def _prepare_manifest(metadata: dict[str, Any], spec: dict[str, Any], check: ClusterCheck) -> None:
    """Run Ray's own conversion of the manifest to an autoscaler config."""
    from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
    from ray.autoscaler._private.util import validate_config

    resource = {"metadata": {"namespace": "default", **metadata}, "spec": spec}
    try:
        config = _derive_autoscaling_config_from_ray_cr(resource)
        validate_config(config)
    except Exception as error:  # Ray raises errors of many types
        check.add("", f"{error} (Ray)")
        return
    for name, group in config["available_node_types"].items():
        if name != config["head_node_type"]:
            check.groups[name] = group["resources"], int(group["max_workers"])


def report_lines(check: ClusterCheck) -> Iterator[str]:
    """Yield the lines that `sigray cluster check` prints."""
    state = "cannot be used" if check.problems else "has values to fill in" if check.placeholders else "ok"
    yield f"{check.path} ({check.kind}): {state}"
    yield from (f"  {problem}" for problem in check.problems)
    for name, (resources, most) in check.groups.items():
        shown = ", ".join(f"{amount:g} {key}" for key, amount in resources.items() if key != "memory" and amount)
        yield f"  {name}: up to {most} x ({shown})"
    yield from (f"  {line}" for line in check.placeholders)
