"""Every cluster file passes; a deliberate mistake in each is caught by name."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from sigray.orchestrator.cluster.files import RAY_VERSION, check_cluster_file
from sigray.orchestrator.config import ConfigError
from sigray.tuning.cli import main
from tests.helpers import hosts

FILES = [Path("cluster.yaml"), *sorted(Path("clusters").glob("*.yaml"))]
GCP, AWS, LOCAL = Path("cluster.yaml"), Path("clusters/aws_gpu.yaml"), Path("clusters/on_premises.yaml")
TPU, KUBE, JOB = Path("clusters/gcp_tpu.yaml"), Path("clusters/kuberay_cluster.yaml"), Path("clusters/kuberay_job.yaml")
GROUPS = "available_node_types"


def test_there_is_a_file_for_each_place():
    kinds = {check_cluster_file(path).kind for path in FILES}
    assert kinds == {"gcp", "aws", "local", "RayCluster", "RayJob"}


@pytest.mark.parametrize("path", FILES, ids=str)
def test_every_file_passes(path):
    check = check_cluster_file(path)
    assert check.problems == []
    assert check.kind == "local" or check.groups


def test_the_manifest_of_a_job_takes_a_sweep(tmp_path):
    """As its comments say; other programs are refused."""
    text = JOB.read_text()
    path = tmp_path / "job.yaml"
    for entrypoint, is_good in (("sigray sweep /etc/sigray/my_study.yaml", True), ("python train.py", False)):
        path.write_text(text.replace("sigray train /etc/sigray/my_run.yaml", entrypoint))
        assert (check_cluster_file(path).problems == []) == is_good


@pytest.mark.parametrize("path", FILES, ids=str)
def test_every_file_has_ports_on_loopback_and_token_auth(path):
    text = path.read_text()
    assert "0.0.0.0" not in text
    assert "RAY_AUTH_MODE=token" in text or "authOptions: {mode: token}" in text


def place(content: Any, dotted: str) -> tuple[Any, Any]:
    """The container that a dotted place lies in, and its key there; numbers index lists."""
    *path, last = [int(part) if part.isdigit() else part for part in dotted.split("/")]
    for part in path:
        content = content[part]
    return content, last


DELETE = object()
MISTAKES = [
    # what Ray's own code finds
    (GCP, "max_wokers", 3, "'max_wokers' was unexpected"),
    (GCP, "head_node_type", "haed", "head_node_type"),
    (GCP, f"{GROUPS}/data/resources", DELETE, f"{GROUPS}.data: 'resources' is a required property"),
    (AWS, f"{GROUPS}/data/min_workers", 99, "smaller than the sum of `min_workers`"),
    (LOCAL, "max_workers", 9, "9, but there are 3 worker_ips"),
    (KUBE, "spec/workerGroupSpecs/0/rayStartParams/resources", "data=8", "data"),
    # what Ray does not find
    (GCP, f"{GROUPS}/data/node_config/machineType", "n2_standard_16", "data.node_config.machineType: 'n2_standard_16'"),
    (GCP, f"{GROUPS}/data/resources/CPU", 17, "data.resources.CPU: 17, but one node of n2-standard-16 has 16"),
    (GCP, f"{GROUPS}/tpu_host/resources/TPU", 8, "tpu_host.resources.TPU: 8, but one node of v4-8 has 4"),
    (TPU, f"{GROUPS}/tpu_v4_64/node_config/acceleratorType", "v4-63", "acceleratorType: 'v4-63' is no TPU slice"),
    (TPU, f"{GROUPS}/tpu_v4_64/node_config/acceleratorType", "v9-64", "acceleratorType: 'v9-64' is no TPU slice"),
    (TPU, f"{GROUPS}/tpu_v4_64/node_config/runtimeVersion", DELETE, "runtimeVersion"),
    (GCP, f"{GROUPS}/gpu/resources/GPU", 2, "gpu.resources.GPU: 2, but one node of a2-highgpu-1g has 1"),
    (GCP, f"{GROUPS}/gpu/node_config/scheduling/onHostMaintenance", "MIGRATE", "onHostMaintenance: TERMINATE"),
    (GCP, f"{GROUPS}/head/node_config/disks/0/initializeParams/sourceImage", "ubuntu", "sourceImage 'ubuntu'"),
    (GCP, "provider/availability_zone", "us-east1-b", "'us-east1-b' is no zone of us-central2"),
    (GCP, "idle_timeout_minutes", DELETE, "idle_timeout_minutes"),
    (GCP, "head_start_ray_commands/1", "ray start --head --num-cpus=0", "RAY_AUTH_MODE=token"),
    (GCP, "worker_start_ray_commands/1", "RAY_AUTH_MODE=token ray start --address=$RAY_HEAD_IP:6379",
     "worker_start_ray_commands: RAY_LOGGER_LEVEL=warning is missing"),
    (KUBE, "spec/workerGroupSpecs/0/template/spec/containers/0/env/1", {"name": "RAY_LOGGER_LEVEL", "value": "info"},
     "RAY_LOGGER_LEVEL is not warning"),
    (GCP, f"{GROUPS}/head/resources/CPU", 8, "head.resources.CPU"),
    (GCP, f"{GROUPS}/head/node_config/scheduling", {"preemptible": True}, "the head is preemptible"),
    (GCP, f"{GROUPS}/gpu/worker_setup_commands", ["pip install torch"], "environment of their own"),
    (GCP, "file_mounts/~\\.ray\\auth_token", DELETE, "~/.ray/auth_token is missing"),
    (GCP, "file_mounts/~\\sigray\\losses", "lossses", "lossses does not exist"),
    (GCP, "setup_commands", ["pip install sigray"], "clusters/setup.sh"),
    (GCP, f"{GROUPS}/data/resources/data", DELETE, "no node offers the resource 'data'"),
    (AWS, f"{GROUPS}/gpu/node_config/InstanceType", "g6.3xlarge", "InstanceType: 'g6.3xlarge' is no machine type"),
    (AWS, f"{GROUPS}/gpu8/resources/training", DELETE, "gpu8.resources.training: missing"),
    (AWS, f"{GROUPS}/data/resources/CPU", 17, "data.resources.CPU: 17, but one node of c7i.4xlarge has 16"),
    (AWS, f"{GROUPS}/data/node_config/InstanceTyp", "c7i.xlarge", "InstanceTyp"),
    (AWS, f"{GROUPS}/gpu/node_config/ImageId", "ami-12345", "ImageId: 'ami-12345'"),
    (AWS, f"{GROUPS}/gpu/node_config/ImageId", DELETE, "ImageId"),
    (AWS, "provider/region", "us-west-9", "'us-west-9' is no region"),
    (AWS, "provider/aws_credentials", {"aws_access_key_id": "x"}, "provider.aws_credentials"),
    (AWS, "cluster_name", "AKIAABCDEFGHIJKLMNOP", "an Amazon access key"),
    (LOCAL, "provider/worker_ips", ["192.0.2.300"], "'192.0.2.300' is no address"),
    (LOCAL, "provider/head_ip", "192.0.2.11", "twice"),
    (LOCAL, "worker_start_ray_commands/1", "RAY_AUTH_MODE=token ray start", "$RAY_HEAD_IP"),
    (KUBE, "spec/rayVersion", "2.9.0", "spec.rayVersion"),
    (KUBE, "spec/authOptions", DELETE, "authOptions.mode"),
    (KUBE, "spec/headGroupSpec/serviceType", "LoadBalancer", "serviceType: LoadBalancer"),
    (KUBE, "spec/headGroupSpec/rayStartParams", {}, "num-cpus"),
    (KUBE, "spec/workerGroupSpecs/2/numOfHosts", 4, "tpu-v4-16.numOfHosts: 4, but a slice of 2x2x2 has 2 hosts"),
    (KUBE, "spec/workerGroupSpecs/2/template/spec/nodeSelector/cloud.google.com\\gke-tpu-accelerator", "tpu-v9",
     "nodeSelector: 'tpu-v9' '2x2x2' is no TPU slice"),
    (KUBE, "spec/workerGroupSpecs/0/template/spec/containers/0/image", "a:latest", "its environment is not pinned"),
    (KUBE, "spec/workerGroupSpecs/0/template/spec/containers/0/image", "REGISTRY/sigray:0.2", "images differ"),
    (JOB, "spec/shutdownAfterJobFinishes", False, "shutdownAfterJobFinishes"),
    (JOB, "spec/entrypoint", "python run.py", "spec.entrypoint"),
    (JOB, "spec/rayClusterSpec/workerGroupSpecs/2/template/spec/containers/0/resources/limits/google.com\\tpu", "8",
     "google.com/tpu: 8, but a host of tpu-v4-podslice 2x2x2 has 4"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "where", "value", "said"), MISTAKES, ids=[f"{m[0].stem}-{m[1]}" for m in MISTAKES])
def test_a_mistake_is_caught_by_name(path, where, value, said, tmp_path):
    content = copy.deepcopy(yaml.safe_load(path.read_text()))
    container, key = place(content, where)
    key = key.replace("\\", "/") if isinstance(key, str) else key
    if value is DELETE:
        del container[key]
    else:
        container[key] = value
    broken = tmp_path / path.name
    broken.write_text(yaml.safe_dump(content))
    problems = check_cluster_file(broken).problems
    assert any(said in problem for problem in problems), problems
    # The problems are about the mistake: the rest of the file is as good as before.
    assert len(problems) <= 6, problems


def test_every_file_has_a_mistake_that_is_caught():
    assert {mistake[0] for mistake in MISTAKES} == set(FILES)


@pytest.mark.parametrize(
    ("name", "num_chips"),
    # cloud.google.com/tpu/docs: v4-8 is one host, v4-16 two; v5e and v6e have slices of 1, 4 and 8 chips on one host
    [("v2-8", 4), ("v4-8", 4), ("v4-16", 4), ("v5litepod-8", 8), ("v5litepod-16", 4), ("v6e-1", 1), ("v6e-8", 8)],
)
def test_chips_of_a_host_of_a_slice(name, num_chips, tmp_path):
    content = yaml.safe_load(GCP.read_text())
    content[GROUPS]["tpu_host"]["node_config"]["acceleratorType"] = name
    path = tmp_path / "cluster.yaml"
    for said, problems in (
        (num_chips, []),
        (16, [f"{GROUPS}.tpu_host.resources.TPU: 16, but one node of {name} has "]),
    ):
        content[GROUPS]["tpu_host"]["resources"]["TPU"] = said
        path.write_text(yaml.safe_dump(content))
        assert [problem.rpartition(str(num_chips))[0] for problem in check_cluster_file(path).problems] == problems


def test_versions_agree_with_what_is_pinned():
    pinned = Path("requirements.txt").read_text()
    assert f"\nray=={RAY_VERSION}\n" in pinned
    assert f"rayproject/ray:{RAY_VERSION}-py311" in Path("clusters/Dockerfile").read_text()
    version = re.search(r"uv==([\d.]+)", Path("Makefile").read_text())[1]
    assert f"UV_VERSION={version}" in Path("clusters/setup.sh").read_text()
    assert f"uv=={version}" in Path("clusters/Dockerfile").read_text()


FILLED_IN = {"YOUR-PROJECT": "vision-481516", "REGISTRY": "ghcr.io/lab", "192.0.2.": "10.0.0."}


@pytest.mark.parametrize("path", FILES, ids=str)
def test_a_file_is_ok_once_it_is_filled_in(path, tmp_path, capsys):
    text = path.read_text()
    has_placeholders = path != AWS  # it names a role, and no project or registry
    assert main(["cluster", "check", str(path)]) == (2 if has_placeholders else 0)
    said = capsys.readouterr().out
    assert said.count(": fill in ") == len(check_cluster_file(path).placeholders)
    assert (f"{path} ({check_cluster_file(path).kind}): has values to fill in" in said) == has_placeholders
    for placeholder, value in FILLED_IN.items():
        text = text.replace(placeholder, value)
    filled = tmp_path / path.name
    filled.write_text(text)
    assert main(["cluster", "check", str(filled)]) == 0
    assert "): ok" in capsys.readouterr().out


@pytest.mark.parametrize(
    "value", ["YOUR-PROJECT", "your_project", "my-project", "<project>", "change-me", "lab.example.com", "198.51.100.7"]
)
def test_what_a_template_leaves_open_is_named(value, tmp_path):
    path = tmp_path / "cluster.yaml"
    text = GCP.read_text().replace("YOUR-PROJECT # fill in", "vision-481516 # was YOUR-PROJECT, see example.com")
    path.write_text(text.replace("vision-481516", value))
    line = next(number for number, line in enumerate(text.splitlines(), 1) if "vision-481516" in line)
    assert check_cluster_file(path).placeholders == [f"line {line}: fill in project_id: {value}"]
    path.write_text(text)
    assert check_cluster_file(path).placeholders == []


def test_the_command_says_what_is_wrong(tmp_path, capsys):
    broken = tmp_path / "cluster.yaml"
    broken.write_text(GCP.read_text().replace("a2-highgpu-1g", "a2_highgpu_1g"))
    assert main(["cluster", "check", str(broken)]) == 2
    assert "'a2_highgpu_1g': expected FAMILY-CLASS-SIZE" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["[1]", "a: [", "provider: {type: azure}", "{apiVersion: v1, kind: Pod}"])
def test_what_is_no_cluster_file_is_refused(text, tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match="x.yaml"):
        check_cluster_file(path)


@pytest.mark.parametrize("own", hosts.OWN)
def test_hosts_of_namespaces_name_a_folder_that_they_cannot_see(own, monkeypatch):
    """The checkout, or the folder of keys and mounts: each host has a file system of its own in its place."""
    for checkout, folder in [(Path("/srv/sigray"), Path(own, "sg")), (Path(own, "sg"), Path("/var/tmp/sg"))]:
        monkeypatch.setattr(hosts, "ROOT", checkout)
        with pytest.raises(ValueError, match=rf"^{own}/sg cannot be seen by hosts of namespaces"):
            hosts.Hosts(folder, ["head"], {})
