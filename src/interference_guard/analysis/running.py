"""A checkpoint read by the names of the model in memory, where transformers saves under other ones.

Since version 5 transformers turns weights over when it loads and saves: a layer's experts are one stack in memory
and single matrices in the file, and the parts of models with several towers have had other names. The rules here
are those of its `conversion_mapping` for language models.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass
from itertools import count, product
from types import MappingProxyType

import torch
from torch import Tensor

from .checkpoints import Weights, resolve

ADAPTER = "base_model.model."
# Begin of a name in memory, and in the file: Llava, Gemma 3, Mistral 3 and others; Qwen2-VL; towers of both; text
# models out of one with several towers; Nemotron-H.
BEGINS = (
    (r"^model\.language_model\.", "language_model.model."),
    (r"^lm_head\.", "language_model.lm_head."),
    (r"^model\.language_model\.", "model."),
    (r"^model\.", ""),
    (r"^model\.", "model.language_model."),
    (r"^model\.", "backbone."),
)
# Within a name: Mixtral, MiniMax; Phi-MoE; ERNIE 4.5; OLMo-Hybrid; Nemotron-H, with the last of the above.
PARTS = (
    (r"\.mlp\.", ".block_sparse_moe."),
    (r"\.mlp\.router\.", ".block_sparse_moe.gate."),
    (r"\.mlp\.gate\.moe_statics\.", ".mlp.moe_statics."),
    (r"\.input_layernorm\.", ".attention_layer_norm."),
    (r"\.post_attention_layernorm\.", ".feedforward_layer_norm."),
    (r"\.embeddings\.weight$", ".embedding.weight"),
)
# Last name of a stack, and of each expert's matrices, whose rows follow one another.
STACKS = (
    ("gate_up_proj", ("gate_proj", "up_proj")),
    ("gate_up_proj", ("w1", "w3")),
    ("down_proj", ("down_proj",)),
    ("down_proj", ("w2",)),
    ("up_proj", ("up_proj",)),
)

Rows = Callable[[str, int, int | None], Tensor]


@dataclass(frozen=True)
class Source:
    """Where one parameter lies in a checkpoint.

    Args:
        names: Of a stack the matrices of each expert, else the one tensor.
        stacked: Whether it is put together from matrices.
    """

    names: tuple[tuple[str, ...], ...]
    stacked: bool = False

    def read(self, rows: Rows, first: int = 0, last: int | None = None) -> Tensor:
        """Rows of the parameter's first axis, by a function that gives those of a tensor."""
        if not self.stacked:
            return rows(self.names[0][0], first, last)
        experts = self.names[first:last]
        return torch.stack([torch.cat([rows(name, 0, None) for name in matrices]) for matrices in experts])

    def split(
        self, rows: Tensor, first: int, shapes: Mapping[str, tuple[int, ...]]
    ) -> Iterator[tuple[str, int, Tensor]]:
        """The way back: tensors that rows from `first` on belong to, the first row of each, and its rows."""
        if not self.stacked:
            yield self.names[0][0], first, rows
            return
        for names, expert in zip(self.names[first : first + len(rows)], rows, strict=True):
            for name, part in zip(names, expert.split([shapes[name][0] for name in names]), strict=True):
                yield name, 0, part


class Running:
    """A checkpoint's weights by the names and in the shapes of the model in memory.

    Args:
        weights: The checkpoint.
        sources: Where each parameter lies in it.
        shapes: Shape of each in memory.
    """

    def __init__(
        self, weights: Weights, sources: Mapping[str, Source], shapes: Mapping[str, tuple[int, ...]]
    ) -> None:
        self.weights, self.sources, self.shapes = weights, sources, MappingProxyType(dict(shapes))
        # What is told of the checkpoint stays.
        self.label, self.model_type, self.tied, self.paths = (
            weights.label,
            weights.model_type,
            weights.tied,
            weights.paths,
        )

    @property
    def saved(self) -> frozenset[str]:
        """Names in the checkpoint of all that is read here."""
        return frozenset(name for item in self.sources.values() for names in item.names for name in names)

    def rows(self, name: str, first: int = 0, last: int | None = None) -> Tensor:
        """Rows of the first axis in fp32; of a stack put together one expert at a time."""
        return self.sources[name].read(self.weights.rows, first, last)


def find_source(name: str, shape: tuple[int, ...], shapes: Mapping[str, tuple[int, ...]]) -> Source | None:
    """Where a parameter of the model in memory lies in a checkpoint, or None.

    Examples:
        >>> experts = {f"m.mlp.experts.{n}.{part}_proj.weight": (3, 8) for n in (0, 1) for part in ("gate", "up")}
        >>> find_source("m.mlp.experts.gate_up_proj", (2, 6, 8), experts).names[1]
        ('m.mlp.experts.1.gate_proj.weight', 'm.mlp.experts.1.up_proj.weight')
    """
    for candidate in _saved_names(name):
        there = resolve(candidate, shapes)
        if there is not None and shapes[there] == shape:
            return Source(((there,),))
        found = _experts(candidate, shape, shapes)
        if found is not None:
            return found
    return None


def saved_name(name: str, names: Container[str]) -> str | None:
    """A checkpoint's name of a parameter of the model in memory that is saved in one piece, or None.

    Examples:
        >>> saved_name("model.language_model.norm.weight", ["language_model.model.norm.weight"])
        'language_model.model.norm.weight'
    """
    return next((item for item in _saved_names(name) if item in names), None)


def _saved_names(name: str) -> Iterator[str]:
    """Names that a parameter of the model in memory may have in a checkpoint, its own first."""
    bare = name.removeprefix(ADAPTER)
    prefix = name[: len(name) - len(bare)]
    same = ("^", "")
    for begin, part in product((same, *BEGINS), (same, *PARTS)):
        yield prefix + re.sub(*part, re.sub(*begin, bare, count=1))


def _experts(name: str, shape: tuple[int, ...], shapes: Mapping[str, tuple[int, ...]]) -> Source | None:
    """The matrices that a stack is put together from, where they fill it."""
    owner, _, last = name.rpartition(".")
    if len(shape) != 3 or not owner.endswith(".experts"):
        return None
    for stack, layers in STACKS:
        if stack != last:
            continue
        experts: list[tuple[str, ...]] = []
        for number in count():
            names = tuple(f"{owner}.{number}.{layer}.weight" for layer in layers)
            if not all(item in shapes for item in names):
                break
            experts.append(names)
        sizes = {(sum(shapes[item][0] for item in names), shapes[names[0]][-1]) for names in experts}
        if len(experts) == shape[0] and sizes == {shape[1:]}:
            return Source(tuple(experts), stacked=True)
    return None
