"""Watches a call of a user's function: a sweep, which runs it again, knows its arguments alone."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import FunctionType
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastjac.errors import FastjacError
from fastjac.fusion.mode import function_name, tensors_in

if TYPE_CHECKING:
    from fastjac.engine.site import Site


def enclosed(
    site: Site, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> AbstractContextManager[Any]:
    """Raise if the call takes more than its arguments into account.

    That is a tensor with a derivative, as a module has that it calls, or random numbers that are not
    PyTorch's. PyTorch's own functions do not, unless they are given a function.
    """
    function = site.function
    own = isinstance(function, FunctionType) and function.__module__.partition(".")[0] != "torch"
    given = any(callable(a) and not isinstance(a, type) for a in (*args, *kwargs.values()))
    return _watched(site, args, kwargs) if own or given else nullcontext()


@contextmanager
def _watched(site: Site, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[None]:
    before = _positions()
    with _Watch(site, tensors_in(args, kwargs)):
        yield
    if _positions() != before:
        raise _refusal(site, "draws random numbers that are not PyTorch's")


class _Watch(TorchDispatchMode):
    """Knows the memory of a call's arguments, and of what the call makes."""

    def __init__(self, site: Site, arguments: list[Tensor]) -> None:
        super().__init__()
        self.site, self.known = site, {}
        self._know(arguments)

    def _know(self, tensors: list[Tensor]) -> None:
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self.known[storage._cdata] = storage  # held, so that no other has its address

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        for tensor in tensors_in(args, kwargs):
            derived = tensor.requires_grad or self.site.varies(tensor)
            if derived and tensor.untyped_storage()._cdata not in self.known:
                raise _refusal(
                    self.site, f"reads a tensor {list(tensor.shape)} that it is not given"
                )
        out = function(*args, **kwargs)
        self._know(tensors_in(out))
        return out


def _refusal(site: Site, what: str) -> FastjacError:
    name = function_name(site.function)
    return FastjacError(
        f"{name} calls a function of the model's that {what}, which fastjac does not see; expected what "
        "it does as calls of its own, or strategy='autograd'"
    )


def _positions() -> tuple[Any, ...]:
    """Where the generators of Python and numpy are."""
    numpy = sys.modules.get("numpy")
    mersenne = None if numpy is None else numpy.random.get_state()[2:]
    return random.getstate(), mersenne
