"""A real S3 server for the tests: SeaweedFS, from the development requirements, on a free port of this machine."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

BUCKET = "sigray"


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


@contextlib.contextmanager
def s3_server(folder: Path) -> Iterator[dict[str, str]]:
    """Start the server; yields the AWS variables that reach it. The bucket is BUCKET."""
    import boto3
    from botocore.exceptions import BotoCoreError, ClientError

    port, master, master_grpc, volume, volume_grpc, filer, filer_grpc, s3_grpc = free_ports(8)
    keys = {"AWS_ACCESS_KEY_ID": "ak", "AWS_SECRET_ACCESS_KEY": "sk1234567890"}
    command = [str(Path(sys.executable).parent / "weed"), f"-logdir={folder}", "mini", f"-dir={folder}"]
    command += ["-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-s3.port={port}", f"-bucket={BUCKET}"]
    command += [f"-master.port={master}", f"-master.port.grpc={master_grpc}", f"-volume.port={volume}"]
    command += [f"-volume.port.grpc={volume_grpc}", f"-filer.port={filer}", f"-filer.port.grpc={filer_grpc}"]
    command += [f"-s3.port.grpc={s3_grpc}", "-master.telemetry=false", "-admin.ui=false", "-webdav=false"]
    command += ["-s3.port.iceberg=0", "-s3.port.lance=0"]
    log = (folder / "weed.log").open("wb")
    process = subprocess.Popen(command, env=os.environ | keys, stdout=log, stderr=log)
    variables = keys | {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "AWS_DEFAULT_REGION": "us-east-1"}
    try:
        client = boto3.client(
            "s3",
            endpoint_url=variables["AWS_ENDPOINT_URL"],
            region_name="us-east-1",
            aws_access_key_id=keys["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=keys["AWS_SECRET_ACCESS_KEY"],
        )
        deadline = time.monotonic() + 60
        while True:
            try:
                client.head_bucket(Bucket=BUCKET)
                break
            except (BotoCoreError, ClientError) as error:
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"no S3 server: {(folder / 'weed.log').read_text()[-2000:]}") from error
                time.sleep(0.2)
        yield variables
    finally:
        process.kill()
        process.wait()
        log.close()
