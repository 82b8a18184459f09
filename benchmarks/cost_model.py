"""What the guard costs by the shapes of a model alone: arithmetic, bytes and messages.

    python -m benchmarks.cost_model

Prints the tables of docs/cost.md; a test compares them. Nothing is measured here: see `benchmarks.overhead`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from interference_guard import GuardConfig
from interference_guard.residual import fewer

from .tables import markdown

FP32 = 4


@dataclass(frozen=True)
class Shapes:
    """A decoder with gated MLPs.

    Args:
        name: Of the published model.
        hidden: Width of the residual stream.
        inner: Channels of one MLP.
        layers: Number of layers.
        heads: Query heads.
        key_heads: Key and value heads.
        vocabulary: Rows of the embedding.
        tied: Whether the output layer is the embedding.
        head: Size of a head.
        head_norms: Whether queries and keys are normalised.
        experts: MLPs of each layer, each with gate and up as one matrix, and a router; 0 for a single MLP.
    """

    name: str
    hidden: int
    inner: int
    layers: int
    heads: int
    key_heads: int
    vocabulary: int
    tied: bool
    head: int = 128
    head_norms: bool = True
    experts: int = 0

    def matrices(self) -> Iterator[tuple[int, int]]:
        """Units and number of every kind of matrix; all are of width `hidden`."""
        # Rows of q, k, v, gate and up, columns of o and down.
        yield self.heads * self.head, 2 * self.layers
        yield self.key_heads * self.head, 2 * self.layers
        if self.experts:
            yield 2 * self.inner, self.layers * self.experts
            yield self.inner, self.layers * self.experts
            yield self.experts, self.layers
        else:
            yield self.inner, 3 * self.layers
        yield self.vocabulary, 1 if self.tied else 2

    def vectors(self) -> Iterator[tuple[int, int]]:
        """Width and number of every kind of norm, each of which is one unit."""
        yield self.hidden, 2 * self.layers + 1
        yield self.head, 2 * self.layers * self.head_norms

    @property
    def norms(self) -> int:
        """Parameters of all norms."""
        return sum(width * count for width, count in self.vectors())

    @property
    def units(self) -> int:
        """Units of all matrices."""
        return sum(units * count for units, count in self.matrices())

    @property
    def parameters(self) -> int:
        """Parameters of all matrices; the norms are left out."""
        return self.units * self.hidden

    @property
    def count(self) -> int:
        """Matrices."""
        return sum(count for _, count in self.matrices())


MODELS = (
    Shapes("Qwen3-0.6B", 1024, 3072, 28, 16, 8, 151_936, True),
    Shapes("Qwen3-4B", 2560, 9728, 36, 32, 8, 151_936, True),
    Shapes("Qwen3-8B", 4096, 12_288, 36, 32, 8, 151_936, False),
    Shapes("Qwen3-32B", 5120, 25_600, 64, 64, 8, 151_936, False),
    Shapes("Llama-3-70B", 8192, 28_672, 80, 64, 8, 128_256, False, head_norms=False),
)
# Its arithmetic is that of the experts a token goes to, which the other tables do not count.
MIXTURE = Shapes("Qwen3-30B-A3B", 2048, 768, 48, 32, 4, 151_936, False, experts=128)
DOMAINS = 3
WORLDS = (1, 8, 64, 1024)


def local_model(shapes: Shapes, config: GuardConfig) -> int:
    """Bytes of one protected domain's anchor: z0 and q0."""
    wide = config.rank + fewer(shapes.hidden, config.residual)
    norms = sum(n * (fewer(width, config.rank) + fewer(width, config.residual)) for width, n in shapes.vectors())
    return FP32 * (shapes.units * wide + norms)


def directions(shapes: Shapes, config: GuardConfig) -> int:
    """Bytes of one protected domain's curvature: the eigenvectors, and the units' energies."""
    norms = sum(n * (width * fewer(width, config.rank) + 1) for width, n in shapes.vectors())
    return FP32 * (shapes.count * shapes.hidden * config.rank + shapes.units + norms)


def running_sums(shapes: Shapes, config: GuardConfig) -> int:
    """Bytes of the curvature of a domain in training: Y, and the units' energies."""
    norms = sum(n * (width * min(config.sketch, width) + 1) for width, n in shapes.vectors())
    return FP32 * (shapes.count * shapes.hidden * config.sketch + shapes.units + norms)


def observe_flops(shapes: Shapes, config: GuardConfig) -> int:
    """Arithmetic of G Omega, G'(G Omega) and the squares, a step."""
    return shapes.parameters * (4 * config.sketch + 2)


def hold_flops(shapes: Shapes, config: GuardConfig, domains: int) -> int:
    """Arithmetic of W [U_1 .. U_D], and of the correction where all domains are at their surface."""
    return 2 * 2 * shapes.parameters * config.rank * domains


def message(shapes: Shapes, config: GuardConfig, domains: int) -> int:
    """Bytes of the one all-reduce of a step where parameters are sharded.

    The coordinates of all protected domains, and G Omega of the matrices whose units are cut: o and down, which
    fully_shard cuts along their rows.
    """
    cut = shapes.layers * (shapes.heads * shapes.head + shapes.inner)
    return FP32 * (domains * shapes.units * config.rank + cut * config.sketch)


def share(part: float, whole: float) -> str:
    """A part in percent, two digits."""
    return f"{part / whole:.2%}"


def size(count: float) -> str:
    """Bytes in the unit that reads best."""
    for unit in ("kB", "MB", "GB"):
        count /= 1000
        if count < 1000 or unit == "GB":
            return f"{count:.3g} {unit}"
    raise AssertionError


def memory_table(config: GuardConfig) -> str:
    """Memory of one protected domain by model."""
    rows = []
    for shapes in (*MODELS, MIXTURE):
        weights = FP32 * (shapes.parameters + shapes.norms)
        anchor, sums = local_model(shapes, config), running_sums(shapes, config)
        kept = anchor + directions(shapes, config)
        parts = (size(anchor), size(kept - anchor), size(kept), share(kept, weights), size(sums))
        rows.append((shapes.name, size(weights), *parts, share(sums, weights)))
    head = ("anchor", "directions", "together", "of the weights", "in training", "of the weights")
    return markdown(("model", "fp32 weights", *head), rows)


def work_table(config: GuardConfig, tokens: int = 1_000_000) -> str:
    """Arithmetic of a step by model, against training on so many tokens (6 a parameter and token)."""
    rows = []
    for shapes in MODELS:
        observe, hold = observe_flops(shapes, config), hold_flops(shapes, config, DOMAINS)
        training = 6 * shapes.parameters * tokens
        rows.append(
            (
                shapes.name,
                f"{observe / 1e12:.3g}",
                f"{hold / 1e12:.3g}",
                f"{training / 1e12:.3g}",
                f"{(observe + hold) / training:.4%}",
            )
        )
    return markdown(
        ("model", "observe, TFLOP", "predict and project, TFLOP", "training, TFLOP", "guard's part"), rows
    )


def message_table(config: GuardConfig) -> str:
    """Bytes that each rank sends in a step's all-reduce (ring), by model and world size, and gradients' own."""
    rows = []
    for shapes in MODELS:
        sent = [2 * (world - 1) / world * message(shapes, config, DOMAINS) for world in WORLDS]
        gradients = (WORLDS[-1] - 1) / WORLDS[-1] * FP32 * shapes.parameters
        rows.append(
            (
                shapes.name,
                *("0" if not item else size(item) for item in sent),
                size(gradients),
                share(sent[-1], gradients),
            )
        )
    head = ("model", *(f"{world:,} ranks" if world > 1 else "1 rank" for world in WORLDS))
    return markdown((*head, "gradients, fp32", "guard's part"), rows)


def main() -> None:
    """Print all tables."""
    config = GuardConfig()
    for made in (memory_table, work_table, message_table):
        print(made(config), end="\n\n")


if __name__ == "__main__":
    main()
