"""A real cluster on hosts of our own: `ray up`, `sigray submit`, metrics, a host cut off and brought back, `ray down`.

    user   the person who starts it, with the key and the cluster file
    head   Ray's head, the driver, the S3 server and the data-shard workers
    t1 t2  a training worker each

One cluster for everything: it is up after about a minute here. The run must end with the weights of a run without Ray,
S3, network or trouble (`tests/helpers/bare.py`).
"""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from sigray.orchestrator.cluster.files import check_cluster_file
from sigray.orchestrator.config import load_config
from tests.helpers.bare import train_bare
from tests.helpers.data import COLOURS, TOWERS, write_dataset
from tests.helpers.hosts import ROOT, Hosts
from tests.helpers.ranks import run_on_ranks
from tests.helpers.runs import LIMIT_S

NUM_STEPS, BATCH = 400, 24
KEYS = {"AWS_ACCESS_KEY_ID": "ak", "AWS_SECRET_ACCESS_KEY": "sk1234567890", "AWS_DEFAULT_REGION": "us-east-1"}


def run_config(shards: str, storage: str) -> dict[str, Any]:
    return {
        "run": {"name": "demo", "storage": storage},
        "data": {
            "shards": shards,
            "block_size": 16,
            "num_lanes": 3,
            "shuffle_window": 32,
            "num_workers": 2,
            "resources_per_worker": {"data": 1},
        },
        "model": {"towers": {**TOWERS, "vision_cfg": {**TOWERS["vision_cfg"], "patch_dropout": 0.25}}},
        "train": {"num_samples": NUM_STEPS * BATCH, "global_batch_size": BATCH, "log_every_steps": 1},
        "cluster": {"num_workers": 2, "resources_per_worker": {"training": 1}},
        "checkpoint": {"save_every_steps": 50, "keep_newest": 100},
    }


def study_file(hosts: Hosts) -> Path:
    """A study of two batch sizes of the run, one training worker for each trial; its classes go with the job."""
    base = run_config("s3://sigray/tars/", "s3://sigray/runs")
    base["data"] |= {"num_workers": 1}
    base["cluster"] |= {"num_workers": 1}
    classes = hosts.folder / "classes.json"
    classes.write_text(json.dumps([{"id": name, "name": name} for name in COLOURS]))
    base["eval"] = {"sets": {"colours": {"shards": "s3://sigray/tars/", "classes": str(classes)}}}
    content = {
        "name": "sizes",
        "base": base,
        "metric": "zero_shot.colours.top1",
        "budget": NUM_STEPS * BATCH // 2,
        "space": {"train.global_batch_size": {"grid": [BATCH // 2, BATCH]}},
        "storage": "s3://sigray/sweeps",
    }
    path = hosts.folder / "study.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def cluster_file(hosts: Hosts) -> dict[str, Any]:
    """clusters/on_premises.yaml with these hosts' addresses; the environment is the machine's, which they share."""
    content = yaml.safe_load((ROOT / "clusters" / "on_premises.yaml").read_text())
    content["provider"] |= {
        "head_ip": hosts.addresses["head"],
        "worker_ips": [hosts.addresses["t1"], hosts.addresses["t2"]],
    }
    content["auth"] = {"ssh_user": "root", "ssh_private_key": "~/.ssh/key"}
    content["min_workers"] = content["max_workers"] = 2
    content["setup_commands"], content["file_mounts"] = [], {"~/.ray/auth_token": "~/.ray/auth_token"}
    small = "--object-store-memory=200000000"
    # The head decodes here, so it has CPUs and the resource for it; a host that is away is missed after 4 s.
    head = content["head_start_ray_commands"][1].replace("--num-cpus=0", "--num-cpus=6 --resources='{\"data\": 2}'")
    for before, after in (("_ms=3000", "_ms=1000"), ("_ms=5000", "_ms=1000"), ("threshold=5", "threshold=3")):
        assert before in head
        head = head.replace(before, after)
    content["head_start_ray_commands"][1] = (
        f"export AUTOSCALER_UPDATE_INTERVAL_S=1 AUTOSCALER_HEARTBEAT_TIMEOUT_S=10; {head} {small}"
    )
    worker = content["worker_start_ray_commands"][1].partition(" --resources=")[0]
    content["worker_start_ray_commands"][1] = f"{worker} --num-cpus=1 --resources='{{\"training\": 1}}' {small}"
    return content


@pytest.fixture(scope="module")
def hosts(own_ray: None, namespaces: None) -> Iterator[Hosts]:
    folder = Path("/var/tmp", f"sg-{int(time.time())}")
    try:
        with Hosts(
            folder, ["head", "t1", "t2"], {"RAY_AUTH_MODE": "token", "RAY_UP_enable_autoscaler_v2": "0"}
        ) as made:
            yield made
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def wait_for(what: str, condition: Callable[[], Any], process: Any = None, every_s: float = 1) -> Any:
    deadline = time.monotonic() + LIMIT_S
    while not (found := condition()):
        assert process is None or process.poll() is None, f"{what}: the process ended"
        assert time.monotonic() < deadline, f"{what}: not after {LIMIT_S:.0f} s"
        time.sleep(every_s)
    return found


def start(hosts: Hosts, host: str, text: str, log: Path) -> subprocess.Popen[bytes]:
    with log.open("wb") as output:
        return subprocess.Popen(hosts.command(host, text), stdout=output, stderr=output, stdin=subprocess.DEVNULL)


def test_a_run_on_three_hosts_survives_the_loss_of_one(hosts, tmp_path, capsys):
    began = time.monotonic()

    def say(text: str) -> None:
        with capsys.disabled():
            print(f"\n[{time.monotonic() - began:5.0f} s] {text}", end="", flush=True)

    head = hosts.addresses["head"]
    processes = []
    try:
        # S3 on the head, with the data in it.
        weed = (
            "mkdir -p /tmp/s3 && AWS_ACCESS_KEY_ID=ak AWS_SECRET_ACCESS_KEY=sk1234567890 exec weed -logdir=/tmp/s3 mini"
        )
        weed += f" -dir=/tmp/s3 -ip={head} -ip.bind={head} -s3.port=8333 -bucket=sigray -master.telemetry=false"
        weed += " -admin.ui=false -webdav=false -s3.port.iceberg=0 -s3.port.lance=0"
        processes.append(start(hosts, "head", weed, tmp_path / "weed.log"))
        shards = write_dataset(hosts.folder / "tars", [60, 40, 70, 30])
        keys = KEYS | {"AWS_ENDPOINT_URL": f"http://{head}:8333"}
        exports = " ".join(f"{name}={value}" for name, value in keys.items())
        (hosts.folder / "put.py").write_text(
            "import sys, boto3\nfor path in sys.argv[1:]:\n"
            "    boto3.client('s3').upload_file(path, 'sigray', 'tars/' + path.rsplit('/', 1)[1])\n"
        )
        put = f"{exports} python {hosts.folder}/put.py {' '.join(map(str, shards))}"
        wait_for("S3", lambda: "Error" not in hosts.run("head", put, check=False), processes[0])
        say("S3 is up")

        # ray up, over ssh.
        (hosts.folder / "cluster.yaml").write_text(yaml.safe_dump(cluster_file(hosts)))
        config = hosts.folder / "run.yaml"
        config.write_text(yaml.safe_dump(run_config("s3://sigray/tars/", "s3://sigray/runs")))
        hosts.run("user", "ray get-auth-token --generate > /dev/null")
        up = hosts.run("user", f"ray up -y {hosts.folder}/cluster.yaml")
        say("ray up has returned")
        assert "0.0.0.0" not in up

        def alive() -> list[str]:
            text = "import ray; ray.init(address='auto', log_to_driver=False, logging_level='ERROR')\n"
            text += "print('\\n'.join(n['NodeManagerAddress'] for n in ray.nodes() if n['Alive']))"
            (hosts.folder / "alive.py").write_text(text)
            return hosts.run("head", f"python {hosts.folder}/alive.py", check=False).split()

        want = {hosts.addresses[name] for name in ("head", "t1", "t2")}
        wait_for("three nodes", lambda: want <= set(alive()))
        say("three nodes are alive")

        # Nothing but sshd and what Ray's own nodes need of each other listens beyond loopback; the dashboard does not.
        assert "refused" in hosts.run("user", f"bash -c '</dev/tcp/{head}/8265' 2>&1", check=False)

        # Prometheus beside the head, and the run.
        processes.append(start(hosts, "head", "exec sigray monitor --out /tmp/monitor", tmp_path / "monitor.log"))
        names = " ".join(f"--env {name}" for name in keys)
        submit = (
            f"{exports} exec sigray submit --cluster {hosts.folder}/cluster.yaml --job demo {names} -- train {config}"
        )
        following = start(hosts, "user", submit, tmp_path / "submit.log")
        processes.append(following)

        def log() -> str:
            return (tmp_path / "submit.log").read_text()

        def step() -> int:
            found = [line.split()[1] for line in log().splitlines() if line.startswith("step ")]
            return int(found[-1]) if found else 0

        wait_for("step 120", lambda: step() >= 120, following, every_s=0.1)
        say(f"step {step()}: pulling the cable of t2")
        hosts.cut("t2")
        wait_for("the loss of t2", lambda: "Starting the workers again" in log(), following)
        say("the run has noticed")
        hosts.mend("t2")
        wait_for("a restart", lambda: "go on from step" in log(), following)
        say("training goes on")

        # Placement: data-shard workers where the resource is, training workers on the two others.
        listed = hosts.run("t1", "ps -eo args", check=False)
        assert "ray::RayTrainWorker" in listed or "ray::_RayTrainWorker" in listed, listed
        assert "ray::DataWorkerActor" not in listed
        assert "ray::DataWorkerActor" in hosts.run("head", "ps -eo args")

        metrics = wait_for("metrics", lambda: scraped(hosts, "ray_sigray_train_loss"), following)
        assert metrics[0]["metric"]["run"] == "demo"
        assert following.wait(timeout=LIMIT_S) == 0, log()
        say("the run has ended")
        assert f"finished at {NUM_STEPS * BATCH:,} samples" in log()
        assert float(scraped(hosts, "ray_sigray_restarts_total")[0]["value"][1]) >= 1
        assert float(scraped(hosts, "sum(ray_sigray_data_decoded_samples_total)")[0]["value"][1]) > 0
        assert float(scraped(hosts, "sum(ray_sigray_store_bytes_total)")[0]["value"][1]) > 0

        # The same weights as if nothing had happened.
        (hosts.folder / "get.py").write_text(
            "import boto3\n"
            f"key = 'runs/demo/checkpoints/step-{NUM_STEPS:010d}/commit.json'\n"
            "print(boto3.client('s3').get_object(Bucket='sigray', Key=key)['Body'].read().decode())\n"
        )
        commit = json.loads(hosts.run("head", f"{exports} python {hosts.folder}/get.py"))

        # A sweep over two batch sizes as a job: one trial on each host, one of which is cut off and comes back.
        tables = {}
        for name in ("cut", "undisturbed"):
            submit = f"{exports} exec sigray submit --cluster {hosts.folder}/cluster.yaml --job {name} {names}"
            submit += f" -- sweep {study_file(hosts)} name={name}"
            following = start(hosts, "user", submit, tmp_path / "sweep.log")
            processes.append(following)
            if name == "cut":

                def trials() -> str:
                    """The logs of the trials, wherever Ray has placed their drivers."""
                    read = "cat ~/sigray-sweeps/cut/trials/*.log"
                    return "".join(hosts.run(host, read, check=False) for host in ("head", "t1", "t2"))

                wait_for("step 100 of both", lambda: trials().count("step    100") >= 2, following, every_s=0.5)
                hosts.cut("t2")
                say("two trials are at step 100: the cable of t2 is pulled")
                wait_for("the loss of t2", lambda: "Starting the workers again" in trials(), following)
                hosts.mend("t2")
            assert following.wait(timeout=LIMIT_S) == 0, (tmp_path / "sweep.log").read_text()
            tables[name] = hosts.run("head", f"cat ~/sigray-sweeps/{name}/trials.csv")
            said = (tmp_path / "sweep.log").read_text().splitlines()[-1]
            assert said.endswith(f"-- train s3://sigray/sweeps/{name}/best.yaml"), said
            say(f"the sweep {name!r} has ended")
        assert tables["cut"] == tables["undisturbed"]
        assert tables["cut"].count("finished") == 2
        down = hosts.run("user", f"ray down -y {hosts.folder}/cluster.yaml")
        assert "No nodes remaining" in down or "Requested" in down or "terminated" in down.lower(), down
        say("ray down has returned")
    finally:
        for name in ("submit", "sweep", "monitor", "weed"):
            path = tmp_path / f"{name}.log"
            if path.exists():
                shutil.copy(path, Path("/var/tmp", f"sigray-cluster-{name}.log"))
        for process in processes:
            process.kill()
            process.wait()
    local = tmp_path / "local.yaml"
    local.write_text(yaml.safe_dump(run_config(str(hosts.folder / "tars"), str(tmp_path / "runs"))))
    undisturbed = run_on_ranks(2, train_bare, load_config(local))[0]
    assert commit["files"]["model.safetensors"] == undisturbed["files"]["model.safetensors"]
    say("the weights are those of the undisturbed run\n")


def scraped(hosts: Hosts, query: str) -> list[dict[str, Any]]:
    (hosts.folder / "query.py").write_text(
        "import sys, urllib.parse, urllib.request\n"
        "form = urllib.parse.urlencode({'query': sys.argv[1]})\n"
        "print(urllib.request.urlopen('http://127.0.0.1:9090/api/v1/query?' + form).read().decode())\n"
    )
    said = hosts.run("head", f"python {hosts.folder}/query.py '{query}'", check=False)
    return json.loads(said)["data"]["result"] if said.startswith("{") else []


def test_the_file_of_these_hosts_is_a_good_one(hosts, tmp_path):
    content = cluster_file(hosts)
    path = tmp_path / "cluster.yaml"
    path.write_text(yaml.safe_dump(content))
    said = " ".join(check_cluster_file(path).problems)
    # What the test leaves out on purpose, and nothing else.
    assert "clusters/setup.sh does not run" in said
    assert len(check_cluster_file(path).problems) == 4, said
