"""One rank of several: trains a plan as `host.train` does and writes what it saw."""

import json
import sys
from pathlib import Path

from tests.verl import host


def main(rank, world, port, model, out, plan):
    host.join_group(rank, world, port)
    made = host.worker(model, host.SMALL)
    metrics = host.train(made, plan, rank=rank, world=world)
    guard = made.engine.interference.guard
    made.save_checkpoint(str(out / "checkpoint"), global_step=len(plan))
    weights = host.weights(made)
    host.torch.save(weights, out / f"weights{rank}.pt")
    table = {
        "losses": [float(loss) for loss, _ in host.losses(metrics)],
        "radius": guard.domains["math"].radius.item(),
        "inside": guard.interference(["math"])["math"].inside,
        "measured": guard.domains["math"].measurement.loss,
        "rows": len(guard.domains["math"].retained),
        "sharded": guard.view.shards.sharded,
    }
    (out / f"rank{rank}.json").write_text(json.dumps(table))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:4]), Path(sys.argv[4]), Path(sys.argv[5]), sys.argv[6].split(","))
