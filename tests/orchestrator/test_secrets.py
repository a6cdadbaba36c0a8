"""Credentials in a config are refused before anything is saved, and no message repeats them."""

from __future__ import annotations

import json

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from sigray.orchestrator.config import ConfigError, load_config
from sigray.orchestrator.secrets import secrets_of
from sigray.tuning.cli import main
from sigray.workers.model.untrusted import open_clip_folder
from sigray.workers.storage import Storage, StorageError
from tests.helpers.data import TOWERS
from tests.helpers.runs import EXAMPLES

CANARY = "c4n4ryS3cret"
AMAZON = "AKIA" + "C4NARY0123456789"  # in two parts, so that no scanner takes it for one


@pytest.fixture
def path(tmp_path):
    content = {
        "run": {"name": "a", "dir": str(tmp_path / "runs")},
        "data": {"shards": "/tars"},
        "model": {"towers": TOWERS},
        "train": {"num_samples": 64, "global_batch_size": 16},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(content))
    return tmp_path / "run.yaml"


@pytest.mark.parametrize(
    ("override", "said"),
    [
        (
            f"data.stores.s3_endpoint=http://name:{CANARY}@127.0.0.1:9000",
            "data.stores.s3_endpoint: name and password in a URL",
        ),
        (f"run.storage=s3://KEY:{CANARY}@bucket/runs", "run.storage: name and password in a URL"),
        (f"data.shards=[/a, 's3://bucket/b?X-Amz-Signature={CANARY}']", "data.shards.1: a signature in a URL"),
        (f"data.stores.secret_access_key={CANARY}", "data.stores.secret_access_key: a secret by its name"),
        (f"model.towers.hf_token={CANARY}", "model.towers.hf_token: a secret by its name"),
        (f"data.stores.profile={AMAZON}", "data.stores.profile: an Amazon access key"),
        (f"data.captions={{'s3://a:{CANARY}@b': 1}}", "data.captions: a key holds name and password in a URL"),
    ],
)
def test_a_secret_is_refused_and_not_repeated(path, override, said, capsys):
    with pytest.raises(ConfigError, match="must not be saved with a run") as caught:
        load_config(path, [override])
    assert said in str(caught.value)
    # Neither by the command, nor by what it would have written.
    for command in (["train", str(path), override], ["submit", "--", "train", str(path), override]):
        assert main(command) == 2
    shown = capsys.readouterr()
    for text in (str(caught.value), shown.out, shown.err):
        assert CANARY not in text
        assert AMAZON not in text
    assert not (path.parent / "runs").exists()


@pytest.mark.parametrize(
    ("content", "line"),
    [
        *(
            ({"a": {name: CANARY}}, f"a.{name}: a secret by its name")
            for name in (
                "secret",
                "aws_secret_key",
                "password",
                "passwd",
                "credential",
                "gcp_credentials",
                "api_key",
                "APIKEY",
                "api-key",
                "access_key",
                "auth_token",
                "session_token",
                "hf_token",
            )
        ),
        ({"a": f"-----BEGIN RSA PRIVATE KEY-----\n{CANARY}"}, "a: a private key"),
        ({"a": f"-----BEGIN PRIVATE KEY-----\n{CANARY}"}, "a: a private key"),
        *(
            ({"a": f"https://h/f?{name}={CANARY}"}, "a: a secret in a URL")
            for name in ("password", "access_key", "sig")
        ),
        *(
            ({"a": f"https://h/f?v=1&{name}={CANARY}"}, "a: a signature in a URL")
            for name in ("X-Goog-Credential", "x-amz-security-token", "X-Goog-Signature")
        ),
        ({"a": "ASIA" + AMAZON[4:]}, "a: an Amazon access key"),
        ({"a": ["no", {"b": AMAZON}]}, "a.1.b: an Amazon access key"),
    ],
    ids=str,
)
def test_each_kind_of_secret_is_found(content, line):
    assert list(secrets_of(content)) == [line]


def test_what_only_sounds_like_a_secret_is_none():
    assert (
        list(secrets_of({"tokenizer": "a", "hf_tokenizer_name": "b", "api": "c", "password": None, "key": "d"})) == []
    )


@given(st.from_regex(r"[A-Za-z0-9/+]{8,40}", fullmatch=True), st.sampled_from(["s3", "http", "https", "gs"]))
def test_any_password_in_a_url_is_found_wherever_it_stands(password, scheme):
    url = f"{scheme}://name:{password.replace('/', '.')}@host/path"
    for content in (url, [url], {"a": {"b": [{"c": url}]}}):
        (line,) = secrets_of({"deep": content})
        assert "name and password in a URL" in line
        assert "host" not in line


@pytest.mark.parametrize("path_of_example", EXAMPLES, ids=str)
def test_no_example_is_taken_for_a_secret(path_of_example):
    assert list(secrets_of(yaml.safe_load(path_of_example.read_text()))) == []


def test_no_tower_of_open_clip_is_taken_for_a_secret():
    """hf_tokenizer_name and the like."""
    files = list((open_clip_folder() / "model_configs").glob("*.json"))
    assert len(files) > 50
    assert [file.name for file in files if list(secrets_of({"towers": json.loads(file.read_text())}))] == []


def test_a_storage_does_not_repeat_credentials():
    with pytest.raises(StorageError) as caught:
        Storage(f"s3://KEY:{CANARY}@bucket/runs")
    assert CANARY not in str(caught.value)
    Storage("/a@b/c")
