"""One forward pass of a causal language model, for its logits and for nothing else."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from .errors import UnsupportedError

if TYPE_CHECKING:
    from .probe import Completions

_TAKES = (
    "Give the guard a causal language model that is called so, or scores of your own: Guard(model, policy=...), "
    "see interference_guard.probe.Policy."
)


def logits_of(model: nn.Module, rows: Completions, first: int = 0) -> Tensor:
    """Logits of the tokens' successors, from one position on.

    Models of transformers are told what else they need not compute: the keys and values of the tokens, and the
    logits before that position.

    Args:
        model: Called as ``model(input_ids=..., attention_mask=...)``.
        rows: Its input, ``(rows, length)``.
        first: Position of the first logits.

    Returns:
        ``(rows, length - first, vocabulary)``, in the model's dtype.

    Raises:
        UnsupportedError: If the model cannot be called with token ids and their mask, or returns no logits.
    """
    kept = rows.input_ids.shape[1] - first
    known = _known(model)
    spared = {name: value for name, value in (("use_cache", False), ("logits_to_keep", kept)) if name in known}
    try:
        output: Any = model(input_ids=rows.input_ids, attention_mask=rows.attention_mask, **spared)
    except (TypeError, ValueError) as error:
        raise UnsupportedError(
            f"{type(model).__name__} was given token ids and their mask, as input_ids and attention_mask, and "
            f"raised {type(error).__name__}: {error}. {_TAKES}"
        ) from error
    if not isinstance(output, Tensor):
        output = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if not isinstance(output, Tensor) or output.dim() != 3:
        raise UnsupportedError(
            f"{type(model).__name__} returned no logits of shape (rows, length, vocabulary), as a tensor or as "
            f"`logits` of what it returns. {_TAKES}"
        )
    # Counted from the end: prompt tuning puts virtual tokens in front, and others return all logits.
    return output[:, -kept:]


def _known(model: nn.Module) -> set[str]:
    """Names of arguments that a model takes; `torch.compile` and peft around it pass them on."""
    inner: Any = getattr(model, "_orig_mod", model)
    base = getattr(inner, "get_base_model", None)
    return set(inspect.signature((base() if callable(base) else inner).forward).parameters)
