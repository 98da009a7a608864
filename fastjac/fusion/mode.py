"""Runs a network's own code, and fuses what it calls."""

from __future__ import annotations

import functools
import sys
import threading
import types
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import BackwardHook

from fastjac.fusion.chains import (
    ACTIVATIONS,
    ADDITIONS,
    Chain,
    batch_norm_chain,
    fusable,
    pool_of,
    recompute_output,
)
from fastjac.fusion.recompute import Recompute, recompute_convolution, recomputing, version_of
from fastjac.ops._library import native
from fastjac.ops.winograd import both_axes, winograd, winograd_is_faster
from fastjac.replaced import original

NESTED = (tuple, list, dict)  # what arguments may be nested in
# Arguments that are no tensors and hold none.
LEAVES = {int, float, bool, str, type(None), torch.Size, torch.dtype, torch.device}
_POOLS = {F.max_pool2d, torch.max_pool2d}
_CONTINUE = ADDITIONS | _POOLS | ACTIVATIONS.keys()  # what may continue a chain
# What asks for a tensor's description, and for none of its values.
QUERIES = {
    *(Tensor.size, Tensor.dim, Tensor.numel, Tensor.nelement, Tensor.ndimension, Tensor.__len__),
    *(Tensor.is_floating_point, Tensor.is_complex, Tensor.element_size, Tensor.get_device),
    *(torch.numel, torch.is_floating_point, torch.is_complex, torch.is_tensor),
    *(
        getattr(Tensor, name).__get__
        for name in ("shape", "dtype", "device", "ndim", "layout", "requires_grad", "is_leaf")
    ),
    *(
        getattr(Tensor, name).__get__
        for name in ("is_cuda", "is_cpu", "is_sparse", "is_quantized", "is_meta")
    ),
    *(getattr(Tensor, name).__get__ for name in ("_version", "itemsize", "nbytes")),
    Tensor._backward_hooks.__set__,  # by C++, after an autograd function that has written in place
}
_ALIASES = {Tensor.data.__get__, Tensor.detach, torch.detach, Tensor.numpy, Tensor.__array__}
_ALIASES |= {Tensor.__dlpack__, Tensor.data.__set__}
_BUILTINS = {type(torch.relu), type(Tensor.relu), type(Tensor.__add__), type(Tensor.shape.__get__)}
_FUNCTIONS = {*_BUILTINS, type(F.relu)}
_REQUIRES_GRAD = Tensor.requires_grad.__get__
_SET_UP_HOOK = BackwardHook._apply_on_tensors.__code__
_WRITERS = {
    "__setitem__",
    "__set__",
    *(f"__i{op}__" for op in ("add", "sub", "mul", "truediv", "pow")),
}
_INPLACE_POSITION = {
    **dict.fromkeys((F.relu, F.relu6, F.selu, F.silu, F.mish, F.hardswish, F.hardsigmoid), 1),
    **dict.fromkeys((F.leaky_relu, F.elu, F.celu), 2),
    **dict.fromkeys((F.hardtanh, F.threshold, F.dropout, F.dropout1d, F.dropout2d), 3),
    **dict.fromkeys((F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout), 3),
    F.rrelu: 4,
}


def is_higher_order(function: Any) -> bool:
    """Whether it is ``torch.cond`` or its like; to ask the class alone takes a microsecond."""
    return type(function) not in _FUNCTIONS and isinstance(function, torch._ops.HigherOrderOperator)


def function_name(function: Any) -> str:
    """A torch function as an error names it."""
    return getattr(function, "__name__", None) or str(function)


def operation_name(function: Any) -> str:
    """The same without an operator's overload: ``relu_`` of ``relu_.default``."""
    return function_name(function).partition(".")[0]


def writes_in_place(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call overwrites its first argument, or its ``out``."""
    name = operation_name(function)
    if (name.endswith("_") and not name.endswith("__")) or name in _WRITERS:
        return True
    if kwargs and (kwargs.get("inplace") is True or kwargs.get("out") is not None):
        return True
    position = _INPLACE_POSITION.get(function)
    return position is not None and len(args) > position and args[position] is True


@functools.lru_cache(maxsize=64)
def overrides(types: tuple[type, ...]) -> bool:
    """Whether one of these subclasses of Tensor redefines what is called on it."""
    default = Tensor.__torch_function__.__func__
    return any(getattr(t.__torch_function__, "__func__", default) is not default for t in types)


def tensors_in(*values: Any) -> list[Tensor]:
    """The tensors in nested tuples, lists and dicts."""
    found: list[Tensor] = []
    _collect_tensors(values, found)
    return found


def _collect_tensors(values: Iterable[Any], found: list[Tensor]) -> None:
    for value in values:
        if type(value) in LEAVES:
            continue
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, NESTED):
            _collect_tensors(value.values() if isinstance(value, dict) else value, found)


class _Pending(NamedTuple):
    """A chain, and the placeholder of its value while nobody has read it."""

    placeholder: weakref.ref[Tensor]
    chain: Chain


class Fusion(TorchFunctionMode):
    """While it is active, this thread's BatchNorms are fused with what follows them.

    ``activations``: those that a chain may have; empty: nothing is fused. Nor is anything on a device
    without native operators, where a chain would be slower than the calls that it fuses. Nothing
    outlives the mode: on exit, every placeholder that is still alive is computed.
    """

    def __init__(self, activations: frozenset[str]) -> None:
        super().__init__()
        self.activations = activations
        self._pending: dict[int, _Pending] = {}
        self._recomputable: dict[int, tuple[Any, int, Recompute]] = {}

    def __enter__(self) -> Fusion:
        self._outer = active_fusion()
        _thread.fusion = self
        return super().__enter__()

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        _thread.fusion = self._outer
        super().__exit__(kind, error, traceback)
        if kind is None:
            self.compute_all()

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if type(function) not in _BUILTINS:
            function = original(function)
        if not args and "input" in kwargs and operation_name(function).endswith("_"):
            args = (kwargs["input"],)  # where a call in place is looked for what it writes to
            kwargs = {name: value for name, value in kwargs.items() if name != "input"}
        if torch.compiler.is_dynamo_compiling():  # torch.cond and its like: the mode sees the run
            return function(*args, **kwargs)
        if function in QUERIES:
            return self.query(function, args, kwargs)
        if types and overrides(types) and torch._C._is_torch_function_enabled():
            return self._call_override(function, types, args, kwargs)
        if self._pending:
            if torch._C._are_functorch_transforms_active():
                # A transform may have wrapped a placeholder.
                with temporarily_clear_interpreter_stack():
                    self.compute_all()
            extended = self._extend(function, args, kwargs) if function in _CONTINUE else None
            if extended is not None:
                return extended
            self._compute_read(function, args, kwargs)
        if self._recomputable and function in _ALIASES:
            self._recomputable.pop(id(args[0]), None)  # a write to the alias would go unnoticed
        if function in BATCH_NORMS:
            return self._batch_norm(*functional_batch_norm(function, args, kwargs))
        return self.call(function, args, kwargs)

    def _call_override(
        self, function: Any, types: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """What a subclass of Tensor does in the place of a call: its own Python, which the mode sees."""
        super().__enter__()
        try:
            for kind in types:
                result = kind.__torch_function__(function, types, args, kwargs)
                if result is not NotImplemented:
                    return result
        finally:
            super().__exit__(None, None, None)
        return function(*args, **kwargs)  # PyTorch's own error

    def run_parts(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A function that is PyTorch's own Python, call by call: past its question for a mode."""
        names = function.__globals__ | {"has_torch_function": lambda _: False}
        body = types.FunctionType(
            function.__code__, names, function.__name__, function.__defaults__, function.__closure__
        )
        body.__kwdefaults__ = function.__kwdefaults__
        super().__enter__()
        try:
            return body(*args, **kwargs)
        finally:
            super().__exit__(None, None, None)

    # What a subclass may add to.

    def slots(self, chain: Chain) -> int:
        """How many slots for a curvature the chain's node has."""
        return 0

    def query(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A call that reads no values; but a backward hook is about to, in C++."""
        if function == _REQUIRES_GRAD and in_backward_hook():
            self.compute(args[0])
            return self.takes_backward_hook(args[0])
        return function(*args, **kwargs)

    def takes_backward_hook(self, tensor: Tensor) -> bool:
        """Whether a module's backward hook fires for ``tensor``."""
        return tensor.requires_grad

    def call(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Any call that is no part of a chain."""
        return self.run(function, args, kwargs)

    def computed(self, chain: Chain, value: Tensor) -> None:
        """A chain got its values."""

    def may_fuse(self, u: Tensor, weight: Tensor | None, bias: Tensor | None) -> bool:
        """Whether a BatchNorm of ``u`` may begin a chain."""
        return (
            bool(self.activations)
            and fusable(u, weight, bias)
            and native(u.device)
            and not in_checkpoint()
        )

    def may_add(self, chain: Chain, other: Tensor) -> bool:
        """Whether ``other`` may become the chain's residual."""
        return True

    def chain_input(self, x: Tensor, *others: Tensor | None) -> Tensor:
        """``x`` as a chain reads it, beside these other inputs."""
        return x

    # Running a call.

    def run(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The call itself: convolutions by the faster algorithm, recomputable values not saved."""
        if is_higher_order(function):
            return run_higher_order(function, args, kwargs)
        convolution = function is torch.conv2d and not in_checkpoint()
        # A checkpoint counts what its hooks are given.
        known = self._recomputes(args) if self._recomputable and not in_checkpoint() else ()
        if not known and not convolution:
            return function(*args, **kwargs)
        function = convolve if convolution else function
        if known:
            with recomputing(known):
                value = function(*args, **kwargs)
        else:
            value = function(*args, **kwargs)
        if convolution and self.activations and value.requires_grad:
            self._note_convolution(value, *args, **kwargs)
        return value

    def _note_convolution(
        self,
        value: Tensor,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        *_: Any,
        **__: Any,
    ) -> None:
        recompute = recompute_convolution(value, input, weight, bias)
        if recompute is not None and native(value.device):
            self._note_recompute(value, recompute)

    def _note_recompute(self, value: Tensor, recompute: Recompute) -> None:
        known, key = self._recomputable, id(value)
        known[key] = (
            weakref.ref(value, lambda _: known.pop(key, None)),
            version_of(value),
            recompute,
        )

    def _recomputes(self, args: Iterable[Any]) -> list[tuple[Tensor, Recompute]]:
        """The recomputable values among a call's arguments."""
        found = []
        for value in args:
            if type(value) in LEAVES:
                continue
            if isinstance(value, tuple | list):
                found += self._recomputes(value)
                continue
            entry = self._recomputable.get(id(value))
            if entry is not None and entry[1] == version_of(value):
                found.append((value, entry[2]))
        return found

    # Chains.

    def _batch_norm(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        u, mean, var, weight, bias, training, momentum, eps = bind_batch_norm(*args, **kwargs)
        if not self.may_fuse(u, weight, bias):
            return self.call(F.batch_norm, args, kwargs)
        known = self._recomputes((u,))
        recompute = known[0][1] if known else None
        map_ = self.chain_input(u, weight, bias)
        chain = batch_norm_chain(
            *(map_, u, mean, var, weight, bias, training, momentum, eps, recompute)
        )
        return self._defer(chain)

    def _defer(self, chain: Chain, onto: Tensor | None = None) -> Tensor:
        placeholder = chain.placeholder(self.slots(chain), onto)
        pending, key = self._pending, id(placeholder)
        reference = weakref.ref(placeholder, lambda _: pending.pop(key, None))
        pending[key] = _Pending(reference, chain)
        return placeholder

    def _extend(
        self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor | None:
        """What the call gives, if it continues a chain."""
        if function in ADDITIONS:
            return self._add(function, args, kwargs)
        x = args[0] if args else kwargs.get("input")
        entry = self._pending.get(id(x))
        if entry is None or entry.chain.grad_enabled != torch.is_grad_enabled():
            return None
        chain = entry.chain
        if function in ACTIVATIONS and chain.takes_activation:
            kind = ACTIVATIONS[function](*args, **kwargs)
            if kind is None or kind[0] not in self.activations:
                return None
            if writes_in_place(function, args, kwargs):
                chain.steps.activation, chain.steps.slope = kind
                return x
            return self._defer(chain.activated(*kind))
        if function in _POOLS and chain.takes_pool:
            pool = pool_of(*args, **({"x": kwargs.pop("input")} | kwargs if not args else kwargs))
            longer = None if pool is None else chain.pooled(pool)
            return None if longer is None else self._defer(longer)
        return None

    def _add(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        if len(args) != 2 or kwargs or args[0] is args[1]:
            return None
        in_place = writes_in_place(function, args, kwargs)
        for x, other in (args,) if in_place else (args, args[::-1]):
            entry = self._pending.get(id(x))
            if entry is None or not isinstance(other, Tensor):
                continue
            chain = entry.chain
            if not chain.takes_addition or chain.grad_enabled != torch.is_grad_enabled():
                continue
            self.compute(other)
            if not self.may_add(chain, other):
                continue
            if other is args[0] and not chain.has_layout_of(other):
                continue
            residual = self.chain_input(other, chain.u, chain.weight, chain.bias)
            longer = chain.with_residual(residual, other)
            if longer is not None:
                return self._defer(longer, x if in_place else None)
        return None

    def compute(self, value: Tensor) -> None:
        """Give a placeholder its values; any other tensor has them."""
        entry = self._pending.pop(id(value), None)
        if entry is None:
            return
        entry.chain.compute(value)
        if entry.chain.recomputable and value.grad_fn is not None:
            self._note_recompute(value, recompute_output(value))
        self.computed(entry.chain, value)

    def compute_all(self) -> None:
        """Give every placeholder its values."""
        for entry in list(self._pending.values()):
            value = entry.placeholder()
            if value is not None:
                self.compute(value)

    def _compute_among(self, values: Iterable[Any]) -> None:
        """Compute the placeholders in nested tuples, lists and dicts."""
        for value in values:
            if not self._pending:
                return
            if id(value) in self._pending:
                self.compute(value)
            elif type(value) not in LEAVES and isinstance(value, NESTED):
                self._compute_among(value.values() if isinstance(value, dict) else value)

    def _compute_read(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Compute what a call reads, and what still has to read what the call overwrites."""
        self._compute_among(args)
        if kwargs:
            self._compute_among(kwargs.values())
        if not self._pending or not writes_in_place(function, args, kwargs):
            return
        for written in tensors_in(args[:1], kwargs.get("out")):
            storage = written.untyped_storage()._cdata
            for entry in list(self._pending.values()):
                value = entry.placeholder()
                if value is not None and entry.chain.reads(storage):
                    self.compute(value)


def run_higher_order(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``torch.cond`` and its like, which trace their branches: no hook may look at what these save.

    In :func:`eager_regions` PyTorch hands ``torch.cond``'s branches over untraced, and then has no
    derivative of them.
    """
    if function is torch.ops.higher_order.cond and not isinstance(args[1], torch.fx.GraphModule):
        with torch.compiler.set_stance("default"):
            return torch.cond(*args, **kwargs)
    return function(*args, **kwargs)


def convolve(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    """``torch.conv2d``, by :func:`fastjac.ops.winograd` where that is faster."""
    if winograd_is_faster(input, weight, stride, padding, dilation, groups):
        return winograd(input, weight, bias, both_axes(padding))
    return torch.conv2d(input, weight, bias, stride, padding, dilation, groups)


def bind_batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> tuple[Any, ...]:
    """The arguments of ``F.batch_norm``, in their order."""
    return input, running_mean, running_var, weight, bias, training, momentum, eps


_BATCH_NORM = F.batch_norm  # as PyTorch has it, whatever a user puts there later
BATCH_NORMS = {
    *(_BATCH_NORM, torch.batch_norm),
    *(torch.ops.aten.batch_norm, torch.ops.aten.batch_norm.default),
}


def functional_batch_norm(
    function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of one of :data:`BATCH_NORMS` as ``F.batch_norm`` takes them."""
    if function is _BATCH_NORM:
        return args, kwargs

    def bind(
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        training: bool,
        momentum: float,
        eps: float,
        cudnn_enabled: bool,
    ) -> tuple[Any, ...]:
        return input, running_mean, running_var, weight, bias, training, momentum, eps

    return bind(*args, **kwargs), {}


def takes_native_statistics(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call takes a batch's statistics by an operator behind ``F.batch_norm``."""
    name = function_name(function)
    if "batch_norm" not in name or function in BATCH_NORMS:
        return False
    flags = [kwargs.get("training"), kwargs.get("train"), *args]
    return "with_update" in name or next((f for f in flags if isinstance(f, bool)), False)


def in_backward_hook() -> bool:
    """Whether the current call comes from the hooks of ``register_full_backward_hook``."""
    return sys._getframe(3).f_code is _SET_UP_HOOK


def in_checkpoint() -> bool:
    """Whether a part of the network runs under ``torch.utils.checkpoint``.

    It runs that part once more in the backward, without this mode, and must find saved the same
    tensors: so nothing is fused there.
    """
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks is not None and getattr(hooks[0], "__module__", "") == "torch.utils.checkpoint"


_thread = threading.local()


def active_fusion() -> Fusion | None:
    """The mode of this thread, if one is active."""
    return getattr(_thread, "fusion", None)


@contextmanager
def unfused() -> Iterator[None]:
    """Run the fused models of this thread as they are."""
    outer, _thread.fusion = active_fusion(), Fusion(frozenset())
    try:
        yield
    finally:
        _thread.fusion = outer


_lock = threading.Lock()
_inside = 0
_stance: Any = None


@contextmanager
def eager_regions() -> Iterator[None]:
    """Run what ``torch.compile`` has wrapped as its own Python, which a mode sees.

    PyTorch has one stance for all threads: it is put back when the last of them leaves.
    """
    global _inside, _stance
    if "torch._dynamo" not in sys.modules:
        yield
        return
    with _lock:
        if not _inside:
            _stance = torch.compiler.set_stance("force_eager")
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if not _inside:
                _stance.__exit__(None, None, None)


def runs_unfused(model: nn.Module) -> bool:
    """Whether nothing of it may be fused: parts that no mode sees, or a backward that is compiled.

    Compiled autograd frees a node's saved tensors before it runs what recomputes values from them.
    """
    dynamo: Any = sys.modules.get("torch._dynamo")
    if dynamo is not None and (
        dynamo.config.compiled_autograd or dynamo.compiled_autograd.compiled_autograd_enabled
    ):
        return True
    return has_script(model)


def has_script(model: nn.Module) -> bool:
    """Whether a part of the network is TorchScript, whose calls no mode sees."""
    todo, seen, script = [model], {id(None)}, torch.jit.ScriptModule
    while todo:
        module = todo.pop()
        if id(module) not in seen:
            if isinstance(module, script):
                return True
            seen.add(id(module))
            todo += module._modules.values()
    return False
