"""A device for machines that have none beside the CPU.

Its tensors lie in the CPU's memory and say that they do not, and an operation that meets tensors of two devices
is an error, as on a GPU. What torch knows of devices belongs to the whole process: use it in one of its own.
"""

from contextlib import contextmanager

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

NAME = "elsewhere"
MOVES = {"aten::copy_", "aten::_to_copy"}
INDEXED = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}


def is_here(device):
    return device is not None and torch.device(device).type == NAME


class Elsewhere(torch.Tensor):
    """A tensor of the pretended device; `raw` is what it is made of."""

    @staticmethod
    def __new__(cls, raw):
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            raw.size(),
            strides=raw.stride(),
            storage_offset=raw.storage_offset(),
            dtype=raw.dtype,
            device=torch.device(NAME, 0),
        )
        made.raw = raw
        return made

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})

    # What reads memory without an operation.
    def untyped_storage(self):
        return self.raw.untyped_storage()

    def tolist(self):
        return self.raw.tolist()

    def __reduce_ex__(self, protocol):
        # Files hold what it is made of, as those of a GPU's tensors do.
        return self.raw.__reduce_ex__(protocol)

    def numpy(self, **_):
        raise TypeError(f"a tensor on {self.device} has no numpy array; use Tensor.cpu() first")


def run(func, args, kwargs):
    """Run an operation on what its tensors are made of."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    ours = [tensor for tensor in tensors if isinstance(tensor, Elsewhere)]
    name = func._schema.name
    if ours and name not in MOVES:
        strangers = [
            item for item in tensors if not isinstance(item, Elsewhere) and not _allowed(func, item, args)
        ]
        if strangers:
            shapes = [(str(item.device), tuple(item.shape)) for item in tensors]
            raise RuntimeError(f"{func} expects all tensors to be on the same device, and found {shapes}")
    raw_args, raw_kwargs = tree_map_only(Elsewhere, lambda tensor: tensor.raw, (args, kwargs))
    device, wrap = kwargs.get("device"), bool(ours)
    if device is not None:
        wrap = is_here(device)
        raw_kwargs = raw_kwargs | {"device": torch.device("cpu")}
    elif name == "aten::copy_":
        wrap = isinstance(args[0], Elsewhere)

    def back(value):
        if not isinstance(value, torch.Tensor) or isinstance(value, Elsewhere):
            return value
        # What is changed in place is returned as it came.
        return next((tensor for tensor in ours if tensor.raw is value), Elsewhere(value) if wrap else value)

    return tree_map(back, func(*raw_args, **raw_kwargs))


def _allowed(func, stranger, args):
    """What a GPU takes of the CPU: single numbers in element-wise operations, and indices."""
    if stranger.dim() == 0 and (torch.Tag.pointwise in func.tags or "_foreach" in func._schema.name):
        return True
    return func._schema.name in INDEXED and any(stranger is leaf for leaf in tree_leaves(args[1]))


class _Operations(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


class _Constructors(TorchFunctionMode):
    """Those that fill memory before there is an operation to see."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func in (torch.tensor, torch.as_tensor) and is_here(kwargs.get("device")):
            device = kwargs.pop("device")
            return func(*args, **kwargs).to(device)
        if func is torch.Tensor.new_tensor and isinstance(args[0], Elsewhere):
            return torch.tensor(args[1], dtype=kwargs.get("dtype", args[0].dtype)).to(args[0].device)
        return func(*args, **kwargs)


class _Generator(torch.Generator):
    """Its numbers are the CPU's."""

    def __new__(cls, device="cpu"):
        return super().__new__(cls, "cpu" if is_here(device) else device)


@contextmanager
def pretended_device():
    """The device, which this process has from now on."""
    if torch._C._get_privateuse1_backend_name() != NAME:
        # Torch has it since 2.9.
        from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

        _setup_privateuseone_for_python_backend(NAME)
        torch.Generator = _Generator
        # Else a module that is moved gets new parameters, and tied ones are two.
        torch.__future__.set_swap_module_params_on_conversion(True)
    with _Operations(), _Constructors():
        yield torch.device(NAME, 0)
