"""100 faults between a run and its store: no checkpoint, lease or embedding is lost, doubled or altered."""

from __future__ import annotations

import copy
import os
from functools import partial
from urllib.parse import urlsplit

import numpy as np
import pytest
import torch

from sigray.workers.checkpoint.index import list_checkpoints, read_metrics
from sigray.workers.checkpoint.lease import RunLease, read_lease
from sigray.workers.checkpoint.writer import CheckpointWriter, load_checkpoint
from sigray.workers.config import CheckpointConfig
from sigray.workers.data.embedding_store import EmbeddingStore, StoredShard
from sigray.workers.storage import Storage
from tests.helpers.faultproxy import FaultProxy, drawn
from tests.helpers.stored import ENDPOINTS, SCHEMES

FAULTS = ("reset", "close", "429", "503", "500", "hang up", "lost answer")


def model_of(seed):
    torch.manual_seed(seed)
    module = torch.nn.Linear(300, 300)
    optimizer = torch.optim.Adam(module.parameters())
    module(torch.randn(2, 300)).square().sum().backward()
    optimizer.step()
    return module, optimizer


def until_it_succeeds(action):
    """Call again what a store refused, as the lease's thread and a second `sigray embed` do."""
    for _ in range(20):
        try:
            return action()
        except OSError as error:
            last = error
    raise last


@pytest.mark.parametrize("scheme", SCHEMES)
def test_of_100_faults_nothing_is_lost_doubled_or_altered(new_place, monkeypatch, minutes, scheme):
    monkeypatch.setattr("sigray.workers.checkpoint.async_writer._PAUSES_S", (0.01, 0.05))
    storage, name = Storage(new_place(scheme)), ENDPOINTS[scheme]
    store, url, weights, tars, round_ = EmbeddingStore(f"{storage.uri}/store"), os.environ[name], {}, {}, 0
    module, optimizer = model_of(0)
    methods = ("GET", "HEAD", "PUT", "POST", "DELETE")
    with FaultProxy(url, drawn(5, 0.3, FAULTS, 10_000), methods) as proxy:
        monkeypatch.setenv(name, proxy.endpoint + urlsplit(url).path)
        lease = RunLease(storage)
        config = CheckpointConfig(keep_newest=1000)
        saver = CheckpointWriter(storage, module, optimizer, config, {}, owner=lease.owner, warn=print)
        while sum(proxy.faults.values()) < 100:
            round_ += 1
            until_it_succeeds(lease.renew)
            with torch.no_grad():
                module.weight += 1
            weights[round_] = copy.deepcopy(module.state_dict())
            saver.save(round_, round_ * 8, metrics=[{"step": round_}])
            content = np.random.default_rng(round_).bytes(50_000)
            shard = StoredShard("train", f"{round_}.tar", 1, "etag", 1, 0, len(content))
            until_it_succeeds(partial(store.write, f"{round_}", shard, content))
            assert until_it_succeeds(partial(store.storage.read, f"train/{round_}.tar")) == content
            tars[f"{round_}"] = content
        saver.close()
        assert min(proxy.faults[kind] for kind in FAULTS[2:]) > 0
        assert proxy.faults["reset"] + proxy.faults["close"] > 0
    monkeypatch.setenv(name, url)
    assert not lease._is_lost
    assert read_lease(storage).owner == lease.owner
    infos = list_checkpoints(storage)
    assert [info.step for info in infos] == list(weights)
    for info in infos:
        other, other_optimizer = model_of(1)
        load_checkpoint(storage, info, other, other_optimizer)
        assert all(torch.equal(tensor, weights[info.step][key]) for key, tensor in other.state_dict().items())
    assert [line["step"] for line in read_metrics(storage)] == list(weights)
    assert store.complete("train").keys() == tars.keys()
    assert all(store.storage.read(f"train/{name}.tar") == content for name, content in tars.items())
    assert len(store.storage.list("train")) == 2 * len(tars)
