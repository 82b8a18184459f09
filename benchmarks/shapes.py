"""The guard's cost at the true layer shapes of a large model, as ratios within one run.

    python -m benchmarks.overhead --model qwen3-4b [--layers 4] [--device cuda] [--threads 2]

Observe, predict, project and probe for one to four protected domains, against one streaming read of the same
weights and against a forward and backward pass over 1,024 tokens. Beside them stand the matrix products that the
method cannot do without, made by torch alone: what the guard takes beyond those is its own. And the memory that
each part reads and writes, counted from its operations. Ratios are those of the layers that are built. Writes
`benchmarks/results/overhead_<model>.json`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from interference_guard import Completions, Guard, GuardConfig
from interference_guard.domain import DomainState
from interference_guard.stepping import hold

from .provenance import write
from .tables import show
from .traffic import moved

# Configurations of published models; from their config.json.
MODELS: dict[str, dict[str, Any]] = {
    "qwen3-0.6b": {
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
    },
    "qwen3-4b": {
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
}
SHARED = {"head_dim": 128, "vocab_size": 151_936, "tie_word_embeddings": True, "max_position_embeddings": 4096}
TOKENS, LENGTH = 1024, 256
# Gradients that are only there to be observed: enough tokens for every direction, and no more.
FEW = 64
DOMAINS = 4
REPEATS = 3
# One read is so short that a few of them do not show how fast it can be.
READS = 20


def build(name: str, layers: int, device: torch.device) -> nn.Module:
    """A randomly initialised model of these shapes with fewer layers."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    settings = {**SHARED, **MODELS[name], "num_hidden_layers": layers}
    with torch.device(device):
        model: nn.Module = Qwen3ForCausalLM(Qwen3Config(**settings))
    return model.float()


def timed(work: Callable[[], Any], device: torch.device, repeats: int = REPEATS) -> float:
    """Least seconds of several calls; the device has finished at both ends."""
    best = float("inf")
    for _ in range(repeats):
        if device.type == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return best


@torch.no_grad()
def depth(name: str, layers: int, device: torch.device) -> dict[str, Any]:
    """Seconds of every part with so many layers, and bytes of the guard's state."""
    model = build(name, layers, device)
    weights = [parameter.detach() for parameter in model.parameters()]
    count = sum(weight.numel() for weight in weights)
    size, rank = 4 * count, GuardConfig().rank

    def draw(rows: int, length: int, seed: int) -> Tensor:
        torch.manual_seed(seed)
        return torch.randint(0, SHARED["vocab_size"], (rows, length), device=device)

    @torch.enable_grad()
    def train_step(ids: Tensor) -> None:
        model.zero_grad(set_to_none=False)
        model(input_ids=ids, labels=ids).loss.backward()

    def read() -> list[Tensor]:
        return [weight.sum() for weight in weights]

    found: dict[str, Any] = {"layers": layers, "parameters": count}
    train_step(draw(1, FEW, 0))
    found["forward_backward"] = timed(lambda: train_step(draw(TOKENS // LENGTH, LENGTH, 0)), device, 2)
    guard = Guard(model, GuardConfig())
    domains = [f"domain_{index}" for index in range(DOMAINS)]
    found["by_domains"] = []
    for index, domain in enumerate(domains):
        train_step(draw(1, FEW, index))
        guard.begin({domain: 1.0})
        guard.before_step()
        # Like the micro-steps of a domain's own training: its sums are there, its directions not yet.
        observe = timed(guard.before_step, device)
        # The first domain is the one whose probe is timed.
        ids = draw(TOKENS // LENGTH, LENGTH, index) if index == 0 else draw(2, FEW, index)
        ones = torch.ones_like(ids)
        guard.retain(domain, Completions(ids, ones, ones, torch.linspace(0, 1, len(ids), device=device)))
        guard.after_step()
        row = {"protected": index + 1, "observe": observe, "moved": {"observe": moved(guard.before_step, size)}}
        found["by_domains"].append(row)
    guard.begin({"next": 1.0})
    found["anchors"] = timed(guard.before_step, device, 1)
    states = [guard.domains[domain] for domain in domains]
    _move(weights, 0)
    hold(guard, states)
    for row in found["by_domains"]:
        chosen = states[: row["protected"]]
        guard.config = replace(guard.config, project=False)
        row["predict"] = timed(lambda chosen=chosen: hold(guard, chosen), device)
        row["moved"]["predict"] = moved(lambda chosen=chosen: hold(guard, chosen), size)
        guard.config = replace(guard.config, project=True)
        # Products of the domains' directions are made once for many steps.
        _move(weights, 1)
        hold(guard, chosen)
        both = []
        for repeat in range(REPEATS):
            _move(weights, 2 + repeat)
            before = [float(state.radius) for state in chosen if state.radius is not None]
            both.append(timed(lambda chosen=chosen: hold(guard, chosen), device, 1))
            assert all(
                float(state.subspace) > 0.9 * radius
                for state, radius in zip(chosen, before, strict=True)
                if state.subspace is not None
            ), "the projection must act"
        row["predict_and_project"] = min(both)
        _move(weights, 2 + REPEATS)
        row["moved"]["predict_and_project"] = moved(lambda chosen=chosen: hold(guard, chosen), size)
        _scale_radii(chosen, 2.0)
        row["moved"]["inside"] = moved(lambda chosen=chosen: hold(guard, chosen), size)
        _scale_radii(chosen, 0.5)
    found["probe"] = timed(lambda: guard.measure(domains[0]), device)
    found["read"] = timed(read, device, READS)
    found["products_of_observe"] = timed(lambda: sketched(weights), device)
    for row in found["by_domains"]:
        row["products"] = timed(lambda columns=rank * row["protected"]: turned(weights, columns), device)
    found["memory"] = memory(guard, domains[0])
    return found


def _scale_radii(states: Sequence[DomainState], factor: float) -> None:
    for state in states:
        assert state.radius is not None
        state.radius = state.radius * factor


def _move(weights: list[Tensor], seed: int) -> None:
    """One step of an optimizer: every weight moves by about 1e-4."""
    torch.manual_seed(seed)
    for weight in weights:
        weight.add_(torch.empty_like(weight).uniform_(-2e-4, 2e-4))


def sketched(weights: list[Tensor]) -> None:
    """The two products of every matrix that its sketch is made of, and nothing else."""
    for weight, factors in _factors(weights, GuardConfig().sketch):
        weight.mT @ (weight @ factors)


def turned(weights: list[Tensor], columns: int) -> None:
    """Every matrix into so many directions, and back; it changes by rounding at most."""
    for weight, factors in _factors(weights, columns):
        weight.addmm_(weight @ factors, factors.mT, alpha=-1e-9)


def _factors(weights: list[Tensor], columns: int) -> Iterator[tuple[Tensor, Tensor]]:
    for weight in weights:
        if weight.ndim == 2:
            yield weight, weight.new_full((weight.shape[1], columns), 1 / weight.shape[1])


def memory(guard: Guard, domain: str) -> dict[str, int]:
    """Bytes of one domain: its local model, where it has one, and its curvature."""
    state = guard.domains[domain]
    blocks = () if state.model is None else state.model.blocks
    local = {id(t): t.numel() * 4 for b in blocks for t in (b.z0, b.q0, b.rho, b.scale, b.lam)}
    sums: dict[int, int] = {}
    for item in state.curvature.sums:
        for tensor in (item.sketch, item.basis, item.eigenvalues, item.energy):
            if tensor is not None:
                sums[id(tensor)] = tensor.numel() * 4
    return {"local_model": sum(local.values()), "curvature": sum(sums.values())}


def ratios(found: dict[str, Any]) -> dict[str, Any]:
    """What is asked of the guard: its parts over one read of the weights, and over a small training step.

    All of them grow with the parameters alike, so the whole model's ratios are those of the layers measured.
    """
    step = found["forward_backward"]
    table = []
    for row in found["by_domains"]:
        parts = {key: row[key] / found["read"] for key in ("observe", "predict", "predict_and_project")}
        total = row["observe"] + row["predict_and_project"]
        table.append(
            {
                "protected": row["protected"],
                "over_read": parts,
                "products_over_read": row["products"] / found["read"],
                "moved": row["moved"],
                "over_forward_backward": total / step,
            }
        )
    return {
        "by_domains": table,
        "products_of_observe_over_read": found["products_of_observe"] / found["read"],
        "anchors_of_four_over_read": found["anchors"] / found["read"],
        "probe_of_1024_tokens_over_forward_backward": found["probe"] / step,
    }


def rates(found: dict[str, Any]) -> dict[str, float]:
    """How fast the device read, and multiplied: in a training step, and in the guard with three domains.

    By the operations that docs/cost.md counts, in 1e9 bytes and operations a second.
    """
    config, row = GuardConfig(), found["by_domains"][2]
    billions = found["parameters"] / 1e9
    return {
        "read": 4 * billions / found["read"],
        "forward_backward": 6 * billions * TOKENS / found["forward_backward"],
        "observe": (4 * config.sketch + 2) * billions / row["observe"],
        "predict_and_project": 4 * config.rank * row["protected"] * billions / row["predict_and_project"],
    }


HEAD = (
    "protected",
    "observe",
    "its products alone",
    "predict",
    "predict and project",
    "their products alone",
    "of a forward and backward pass",
)


def cells(found: dict[str, Any]) -> list[tuple[str, ...]]:
    """Rows of the table of `ratios`, under `HEAD`."""
    rows = []
    for row in found["by_domains"]:
        over, alone = row["over_read"], (found["products_of_observe_over_read"], row["products_over_read"])
        values = (over["observe"], alone[0], over["predict"], over["predict_and_project"], alone[1])
        parts = [f"{value:.1f}" for value in values]
        rows.append((str(row["protected"]), *parts, f"{row['over_forward_backward']:.0%}"))
    return rows


MOVED_HEAD = ("protected", "observe", "predict", "predict and project", "nothing to project")


def moved_cells(found: dict[str, Any]) -> list[tuple[str, ...]]:
    """Rows of the table of what is moved, in reads of the weights, under `MOVED_HEAD`."""
    parts = ("observe", "predict", "predict_and_project", "inside")
    return [
        (str(row["protected"]), *(f"{row['moved'][part]['reads']:.1f}" for part in parts))
        for row in found["by_domains"]
    ]


def measure(name: str, layers: int, device: torch.device) -> None:
    """Measure, print and write."""
    from rich.console import Console

    measured = depth(name, layers, device)
    found = ratios(measured)
    path = write(
        f"overhead_{name}",
        {
            "model": name,
            "device": str(device),
            "ratios": found,
            "billions_a_second": rates(measured),
            "measured": measured,
        },
    )
    show(f"{name} on {device}: times over one read of the weights", HEAD, cells(found))
    show(f"{name}: memory moved, in reads of the weights", MOVED_HEAD, moved_cells(found))
    Console().print({key: value for key, value in found.items() if key != "by_domains"})
    print(f"written to {path}")
