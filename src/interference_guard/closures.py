"""Steps that are given a closure, which computes the gradients inside of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer


def closure_of(args: Any, kwargs: Any) -> tuple[Callable[[], Any] | None, int | None]:
    """A step's closure and its place among the positional arguments a pre-hook sees (None: a keyword)."""
    if kwargs.get("closure") is not None:
        return kwargs["closure"], None
    # Since torch 2.0 the optimizer itself is the first positional argument a pre-hook sees.
    for place, item in enumerate(args):
        if callable(item) and not isinstance(item, Optimizer):
            return item, place
    return None, None


def with_closure(
    args: Any, kwargs: Any, closure: Callable[[], Any], place: int | None
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a step with `closure` in place of their own."""
    if place is None:
        return args, {**kwargs, "closure": closure}
    return (*args[:place], closure, *args[place + 1 :]), kwargs


def observed(closure: Callable[[], Any], observe: Callable[[], None]) -> Callable[[], Any]:
    """The closure, with a call of `observe` after its first evaluation; one that raises was none."""
    seen = False

    def evaluate() -> Any:
        nonlocal seen
        result = closure()
        if not seen:
            seen = True
            observe()
        return result

    return evaluate
