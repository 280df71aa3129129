"""A weight as a tensor that is made anew whenever it is read, so that autograd keeps nothing of it."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Private names of torch 2.13, and so is `torch._C` below: it has the fields of a tensor, and reads arguments of `to`.
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils._pytree import tree_map

from modular_experts.deltas import Delta

_ABOUT = {
    *("size", "dim", "numel", "stride", "element_size", "is_floating_point", "is_contiguous", "__len__"),
    *("untyped_storage", "data_ptr", "storage_offset"),
    *("empty_like", "zeros_like", "ones_like", "new_empty", "new_zeros", "new_ones", "new_full", "new_tensor"),
}
"""Functions that ask for shape, dtype and device only."""
_FIELDS = {
    vars(torch._C.TensorBase)[name].__get__
    for name in ("shape", "dtype", "device", "ndim", "requires_grad", "is_cuda", "is_meta", "is_leaf", "grad_fn")
}


class TransientWeight(Tensor):
    """Stands for a frozen weight `(out, in)` of which only another form is in memory: quantised, or parted (FSDP2).

    It has shape, dtype and device of the weight, and the memory of one number. `F.linear` reads it in forward, and
    again in backward (`linear`). Every other function gets the weight as it was read, which autograd may keep; what
    would write into it is refused.
    """

    _read: Callable[[], Tensor]
    _added: Delta | None

    @classmethod
    def of(
        cls, read: Callable[[], Tensor], shape: Sequence[int], dtype: torch.dtype, device: torch.device
    ) -> "TransientWeight":
        """Make one of a function that dequantises, which returns a new tensor at each call."""
        whole = torch.zeros((), dtype=dtype, device=device).expand(*shape)
        if type(whole) is not Tensor:  # a fake tensor, which has a class of its own
            with unset_fake_temporarily():
                return cls.of(read, shape, dtype, device)
        made = whole.as_subclass(cls)
        made._read = read
        made._added = None
        return made

    @torch.no_grad()
    def read(self) -> Tensor:
        """Return the weight as a new plain tensor."""
        read = self._read().to(self.dtype)
        return read if self._added is None else self._added.add_to(read)

    def plus(self, delta: Delta) -> "TransientWeight":
        """Return the weight plus a delta, which is added at each reading and gets no gradient."""
        made = self.of(self._read, self.shape, self.dtype, self.device)
        made._added = delta
        return made

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """Return the weight in another dtype, still to be read."""
        _, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
        made = self.of(self._read, self.shape, dtype or self.dtype, self.device)
        made._added = self._added
        return made

    def detach(self) -> Any:
        return self

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        with torch._C.DisableTorchFunctionSubclass():
            if func in _FIELDS or name in _ABOUT:
                return func(*args, **kwargs)
            if name == "__setitem__" or (name.endswith("_") and not name.endswith("__") and isinstance(args[0], cls)):
                raise TypeError(f"{name} would write into a weight that is made anew at each reading")
            if func is F.linear and isinstance(args[1], cls):
                return linear(*args, **kwargs)
            args, kwargs = tree_map(lambda one: one.read() if isinstance(one, cls) else one, (args, kwargs))
        return func(*args, **kwargs)


def linear(x: Tensor, weight: TransientWeight, bias: Tensor | None = None) -> Tensor:
    """Return `x W^T + bias` in the dtype of `x`, or of autocast where it is on; backward needs neither `x` nor `W`."""
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    return _Linear.apply(x.to(dtype), bias if bias is None else bias.to(dtype), weight.to(dtype))


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, bias, weight):
        ctx.weight = weight
        return F.linear(x, weight.read(), bias)

    @staticmethod
    def backward(ctx, grad):
        grad_x = grad @ ctx.weight.read() if ctx.needs_input_grad[0] else None
        grad_bias = grad.flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        return grad_x, grad_bias, None
