"""One rank of several: trains a plan as `host.train` does and writes what it saw."""

import json
import sys
from pathlib import Path

from interference_guard.measuring import look
from tests.verl import host


def main(rank, world, port, model, out, plan, pieces, begun=None, start=0):
    host.join_group(rank, world, port)
    state = {} if begun is None else {"state": str(begun / "checkpoint")}
    made = host.worker(model, host.SMALL | state, micro=16 // world, fsdp_size=pieces)
    if begun is not None and (begun / "weights0.pt").exists():
        host.put_weights(made, host.torch.load(begun / "weights0.pt"))
    metrics = host.train(made, plan, start, rank=rank, world=world)
    guard = made.engine.interference.guard
    made.save_checkpoint(str(out / "checkpoint"), global_step=len(plan))
    weights = host.weights(made)
    host.torch.save(weights, out / f"weights{rank}.pt")
    table = {
        "losses": [float(loss) for loss, _ in host.losses(metrics)],
        "radius": guard.domains["math"].radius.item(),
        "inside": guard.raw_parts(["math"])["math"].inside,
        "measured": guard.domains["math"].measurement.loss,
        "loss": look(guard, guard.domains["math"]).loss,
        "rows": len(guard.domains["math"].retained),
        "sharded": guard.view.shards.sharded,
        "pieces": guard.view.shards.world,
    }
    (out / f"rank{rank}.json").write_text(json.dumps(table))


if __name__ == "__main__":
    rank, world, port, model, out, plan, pieces, *begun = sys.argv[1:]
    more = (Path(begun[0]), int(begun[1])) if begun else ()
    main(int(rank), int(world), int(port), Path(model), Path(out), plan.split(","), int(pieces), *more)
