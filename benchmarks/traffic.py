"""How much memory a piece of work reads and writes, counted from its operations, whatever takes how long."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Operations that make the host wait for a device.
READS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::equal")
# They touch no memory.
FREE = ("aten::empty", "aten::new_empty", "aten::_unsafe_view")


class Traffic(TorchDispatchMode):
    """Counts while it is entered.

    Attributes:
        bytes: Of what operations take and give; views and fresh memory count nothing.
        operations: Their number, on an accelerator about that of its kernels.
        waits: How often the host reads numbers back.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.operations = self.waits = 0
        self._lists = _Lists(self)

    def __enter__(self) -> Traffic:
        self._lists.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._lists.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation, and count it."""
        found = func(*args, **(kwargs or {}))
        if func._schema.name in READS:
            self.waits += 1
        elif not func.is_view and not func._schema.name.startswith(FREE):
            tensors = [leaf for leaf in tree_leaves((args, kwargs, found)) if isinstance(leaf, Tensor)]
            self.bytes += sum(item.numel() * item.element_size() for item in tensors)
            self.operations += 1
        return found


class _Lists(TorchFunctionMode):
    """Counts lists of numbers, which on the CPU are read without an operation."""

    def __init__(self, traffic: Traffic) -> None:
        super().__init__()
        self._traffic = traffic

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call one function, and count it if it gives a list."""
        if func is Tensor.tolist:
            self._traffic.waits += 1
        return func(*args, **(kwargs or {}))


def moved(work: Callable[[], Any], size: int) -> dict[str, float]:
    """What a piece of work moves, in parts of `size` bytes, in how many operations, waiting how often."""
    with Traffic() as seen:
        work()
    return {"reads": seen.bytes / size, "operations": seen.operations, "waits": seen.waits}
