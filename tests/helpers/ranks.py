"""Run a function on several gloo ranks, each a process of its own, and bring the results back."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp


def run_on_ranks(world_size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """`function(rank, world_size, *arguments)` on every rank of a gloo group; its results by rank.

    The function must be importable by name. Results travel through files, so they may be of any size.
    """
    with tempfile.TemporaryDirectory() as folder:
        # The fork server imports torch and open_clip once for all tests: a fresh interpreter would do so per rank.
        multiprocessing.set_forkserver_preload(["torch", "open_clip", "workers.train"])
        arguments_of_main = (world_size, folder, function, arguments)
        mp.start_processes(_rank_main, arguments_of_main, nprocs=world_size, start_method="forkserver")
        return [torch.load(Path(folder, f"result-{rank}"), weights_only=False) for rank in range(world_size)]


def _rank_main(rank: int, world_size: int, folder: str, function: Callable[..., Any], arguments: tuple) -> None:
    torch.set_num_threads(1)
    store = Path(folder, "store")
    try:
        torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
        result = function(rank, world_size, *arguments)
        temporary = Path(folder, f"result-{rank}.tmp")
        torch.save(result, temporary)
        os.replace(temporary, Path(folder, f"result-{rank}"))
        torch.distributed.destroy_process_group()
    except BaseException:
        traceback.print_exc()
        raise
