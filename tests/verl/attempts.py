"""One rank of two, whose checkpoint is saved a second time after its steps were trained again."""

import shutil
import sys
from pathlib import Path

import pytest

from interference_guard.errors import StateError
from tests.verl import host

FULL = OSError(28, "No space left on device")


def attempt(model, seed, rank, steps=1):
    made = host.worker(model, host.SMALL)
    host.train(made, ["math"] * steps, start=seed, rank=rank, world=2)
    return made


def save(made, folder):
    made.save_checkpoint(str(folder), global_step=1)


def refused(model, folder, message):
    """Both ranks refuse, so that neither waits for the other."""
    made = host.worker(model, host.SMALL)
    with pytest.raises(StateError, match=message):
        made.load_checkpoint(str(folder), del_local_after_load=False)


def copy_state(rank, source, target):
    name = f"interference_guard_rank{rank}"
    shutil.rmtree(target / name, ignore_errors=True)
    shutil.copytree(source / name, target / name)


def main(rank, port, model, out):
    host.join_group(rank, 2, port)
    first, second = attempt(model, 0, rank), attempt(model, 50, rank)
    for made, name in ((first, "first"), (second, "second"), (first, "again")):
        save(made, out / name)
    # The disk of one rank is full when the steps were trained again.
    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            patch.setattr("interference_guard.checkpoint.save_file", fail)
        save(second, out / "again")
    refused(model, out / "again", "does not exist")
    assert not any((out / "again").glob("interference_guard*/*"))

    # States by another attempt than the weights, of both ranks and of one.
    host.dist.barrier()
    copy_state(rank, out / "first", out / "again")
    host.dist.barrier()
    refused(model, out / "again", r"beside other weights.*trainer\.resume_from_path")
    host.dist.barrier()
    copy_state(0, out / "second", out / "again") if rank == 0 else None
    host.dist.barrier()
    refused(model, out / "again", "of 2 attempts")

    # Each rank on a disk of its own, where one has files of a later step.
    host.train(first, ["math"], start=1, rank=rank, world=2)
    save(first, out / "later")
    own = out / f"own{rank}"
    own.mkdir()
    copy_state(rank, out / ("later" if rank else "first"), own)
    made = host.worker(model, {**host.SMALL, "state": str(own)})
    with pytest.raises(StateError, match=r"at steps \[1, 2\], of 2 attempts"):
        host.train(made, ["math"], rank=rank, world=2)
    shutil.rmtree(own / "interference_guard_rank1", ignore_errors=True)
    with pytest.raises(StateError, match=r"rank1/interference_guard_rank1\.json does not exist"):
        host.train(made, ["math"], rank=rank, world=2)

    # What was not touched is resumed.
    made = host.worker(model, host.SMALL)
    made.load_checkpoint(str(out / "second"), del_local_after_load=False)
    assert made.engine.interference.guard.steps == 1
    host.dist.barrier()


def fail(*arguments):
    raise FULL


if __name__ == "__main__":
    number, _, address, path, folder = sys.argv[1:6]
    main(int(number), int(address), Path(path), Path(folder))
