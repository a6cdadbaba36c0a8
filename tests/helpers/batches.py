"""The batches of each rank, fed by data workers in this process."""

from sigray.workers.data.loader import Loader
from sigray.workers.data.manifest import scan_shards
from sigray.workers.data.worker import DataWorker, build_order, image_kind
from tests.helpers.bare import OneWorker


def manifest_of(data):
    return scan_shards(data.shards, data)


def batches(
    data,
    model,
    *,
    batch,
    rank=0,
    world_size=1,
    first=0,
    last=12,
    worker=None,
    source=OneWorker,
    seed=5,
    pixels=None,
    noise=None,
):
    manifest = manifest_of(data)
    loader = Loader(
        build_order(manifest, data, seed),
        source(worker or DataWorker(manifest, data, model, seed=seed), shares_memory=True),
        data.model_copy(update={"prefetch_batches": 2}),
        image_kind=image_kind(manifest, model, pixels),
        global_batch_size=batch,
        rank=rank,
        world_size=world_size,
        first_step=first,
        last_step=last,
        pixels=pixels,
        noise=noise,
    )
    return list(loader)
