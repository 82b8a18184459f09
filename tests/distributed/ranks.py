"""Runs a function on several CPU processes of one gloo group and returns what each rank returned."""

import os
import sys
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def _work(rank, world, function, arguments, folder):
    torch.set_num_threads(1)
    # What torchrun sets, for hosts that look there.
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "ACCELERATE_USE_CPU": "true"}
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world)
    try:
        torch.save(function(*arguments), f"{folder}/result_{rank}")
    except BaseException:
        # The other ranks may hang in a collective: the parent must see the cause and not a time-out.
        Path(f"{folder}/error_{rank}").write_text(traceback.format_exc())
        os._exit(1)
    # No rank closes its connections while another one still reads from them.
    dist.barrier()
    dist.destroy_process_group()
    # The interpreter takes gloo's threads down in no order, and seldom, but now and then, ends in an abort.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def run_ranks(world, function, *arguments, folder):
    """Results of ``function(*arguments)`` by rank; `function` must be importable."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        mp.spawn(_work, (world, function, arguments, folder), nprocs=world)
    except Exception as error:
        found = "\n".join(path.read_text() for path in sorted(folder.glob("error_*")))
        raise AssertionError(found or str(error)) from error
    return [torch.load(folder / f"result_{rank}", weights_only=False) for rank in range(world)]
