"""Whole training steps as CUDA graphs: captured once, then replayed by one call of the driver."""

from __future__ import annotations

import gc
import random
import sys
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

from fastjac.errors import FastjacError

_aten = torch.ops.aten


class NoSynchronisation(TorchDispatchMode):
    """A mode that raises for an operator whose result the host must wait for, and names it.

    Such an operator reads a tensor's values into Python, gives a tensor whose shape depends on values,
    or copies between the host and the device. It is active in a backward too, whichever thread runs it.

    Args:
        device_type: whose tensors the host must not wait for.
        raises: False only notes the first such operator, in ``refused``.

    >>> import torch
    >>> with NoSynchronisation("cpu"):
    ...     torch.ones(3).sum().item()
    Traceback (most recent call last):
    fastjac.errors.FastjacError: aten._local_scalar_dense reads a tensor's value into Python, ...
    """

    supports_higher_order_operators = True

    def __init__(self, device_type: str = "cuda", raises: bool = True) -> None:
        super().__init__()
        self.device_type, self.raises = device_type, raises
        self.refused: FastjacError | None = None

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if isinstance(operator, OpOverload) and self.refused is None:
            reason = self._reason(operator, args, kwargs)
            if reason is not None:
                self.refused = FastjacError(
                    f"{operator.overloadpacket} {reason}, for which the host waits{_place()}: a CUDA "
                    "graph cannot hold it; expected a step without it"
                )
                if self.raises:
                    raise self.refused
        return operator(*args, **kwargs)

    def _reason(self, operator: OpOverload, args: Any, kwargs: Any) -> str | None:
        """Why the host waits for an operator; None: it does not."""
        packet = operator.overloadpacket
        tensors = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)]
        devices = {t.device.type for t in tensors}
        if packet is _aten._to_copy and kwargs.get("device") is not None:
            devices.add(torch.device(kwargs["device"]).type)
        if self.device_type not in devices:
            return None
        if packet in _COPIES:
            return f"copies between {' and '.join(sorted(devices))}" if len(devices) > 1 else None
        if packet is _aten.lift_fresh:
            return "makes a tensor on the device from Python's numbers"
        if packet in (_aten.index, *_WRITES):
            masks = any(t.dtype in (torch.bool, torch.uint8) for t in _flat(args[1]))
            if not masks or (packet in _WRITES and _is_number(args[2])):  # that is a masked_fill
                return None
            return "indexes with a mask, whose count sets the result's shape"
        if packet is _aten.repeat_interleave and kwargs.get("output_size") is not None:
            return None
        if packet in _READS or torch.Tag.data_dependent_output in operator.tags:
            return "reads a tensor's value into Python"
        if packet in _SIZES or torch.Tag.dynamic_output_shape in operator.tags:
            return "gives a tensor whose shape depends on values"
        return None


def _place() -> str:
    """The line that is at work outside of PyTorch and of this file."""
    inside = str(Path(torch.__file__).parent)
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if name != __file__ and not name.startswith((inside, "<")):
            return f", at {name}:{frame.f_lineno}"
        frame = frame.f_back
    return ""


_COPIES = (_aten._to_copy, _aten.copy_, _aten.copy)
_WRITES = (_aten.index_put, _aten.index_put_)
_READS = (
    *(_aten._local_scalar_dense, _aten.item, _aten.equal, _aten.is_nonzero, _aten.allclose),
    _aten._linalg_check_errors,
)
_SIZES = (_aten.nonzero, _aten.nonzero_numpy, _aten.masked_select, _aten.unique_dim)


def _flat(indices: Any) -> list[Tensor]:
    return [t for t in tree_flatten(indices)[0] if isinstance(t, Tensor)]


def _is_number(value: Tensor) -> bool:
    return value.device.type == "cpu" and value.numel() == 1


def graphed(step: Callable[..., Any], warmup: int = 3) -> GraphedStep:
    """``step`` as a CUDA graph: the first calls run as they are, the next is captured and replayed.

    A step is whatever is done for a batch: forward, Jacobian, loss, backward, optimiser. Replayed, its
    kernels run without Python, and so without the host's time between them, which is what a small
    batch takes on a GPU. Every call is one step: none is taken only to warm up, or to capture.

    Args:
        step: called with tensors on one GPU, and other arguments that never change; in lists, tuples
            and dicts, if need be. It gives tensors, likewise.
        warmup: how many calls run as they are, on a stream of their own. The first makes what is made
            once (an optimiser's state, a library's workspace), which a capture must find there; the
            last is watched for operators that make the host wait.

    Returns:
        A callable that takes what the first call took, in tensors of the same shapes, dtypes and
        device, and gives what ``step`` does, detached. **The next call overwrites the results**: clone
        what is kept.

    What a replay sees: the arguments, which are copied to where the graph reads them; random numbers,
    which differ from replay to replay as they do from step to step, from PyTorch's generator of the
    device; and every tensor that the step reads, if it is changed in place: weights, buffers, a learning
    rate. What it does not see is Python: a branch, a counter, ``train()`` and ``eval()``, a number. So a
    learning rate that changes must be a tensor on the GPU: ``Adam(..., lr=torch.tensor(1e-3,
    device="cuda"), capturable=True)``, ``SGD(..., lr=torch.tensor(0.1, device="cuda"), fused=True)``.
    Learning-rate schedulers then write to that tensor, outside of the step. GradScaler makes the host
    wait: bfloat16 needs none.

    Raises :class:`fastjac.FastjacError` where there is no GPU; for arguments that differ from the first
    ones; in the call that captures, for an operator that makes the host wait, naming it and its line,
    for what CUDA cannot capture, and for random numbers drawn on the host; and before a replay, for an
    optimiser's Python number that has changed. A step that raised has changed no weights.

    >>> import torch
    >>> def train(x, y):
    ...     optimizer.zero_grad()
    ...     out = matcher(x, y)
    ...     loss = torch.nn.functional.cross_entropy(out.student_logits, y) + out.jacobian_loss
    ...     loss.backward()
    ...     optimizer.step()
    ...     return loss
    >>> step = fastjac.graphed(train)  # doctest: +SKIP
    >>> for x, y in loader:  # doctest: +SKIP
    ...     total += step(x, y)
    """
    if not callable(step):
        raise FastjacError(f"graphed: step must be callable; got {type(step).__name__}")
    if not isinstance(warmup, int) or warmup < 2:
        raise FastjacError(
            "graphed: warmup must be an int, at least 2 (the first call makes what is made once, the "
            f"last shows whether the host waits); got {warmup!r}"
        )
    if not torch.cuda.is_available():
        raise FastjacError(
            "graphed needs a GPU: torch.cuda.is_available() is false; call the step itself"
        )
    return GraphedStep(step, warmup)


class GraphedStep:
    """What :func:`graphed` gives."""

    def __init__(self, step: Callable[..., Any], warmup: int) -> None:
        self.step, self.left = step, warmup
        self.graph: torch.cuda.CUDAGraph | None = None
        self._waits: FastjacError | None = None
        self._stream: torch.cuda.Stream  # from the first call on
        self._example: list[Any] = []
        self._structure: Any = None
        self._results: Any = None
        self._options: list[tuple[Optimizer, list[dict[str, Any]]]] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        given, structure = tree_flatten((args, kwargs))
        if self._structure is None:
            self._begin(given, structure)
        self._check(given, structure)
        with torch.cuda.device(self._stream.device):
            if self.graph is None and self.left > 0:
                self.left -= 1
                return self._run_beside(args, kwargs)
            graph = self.graph or self._capture(given)
            self._check_optimizers()
            for static, value in zip(self._example, given, strict=True):
                if isinstance(static, Tensor):
                    static.copy_(value, non_blocking=True)
            graph.replay()
        return self._results

    def _begin(self, given: list[Any], structure: Any) -> None:
        """Note the first arguments, which all others must resemble."""
        tensors = [t for t in given if isinstance(t, Tensor)]
        for place, value in enumerate(given):
            # An array's values may change, unseen.
            if getattr(value, "shape", None) and not isinstance(value, Tensor):
                raise FastjacError(
                    f"graphed: argument {place}: expected a tensor on a GPU, got {type(value).__name__}"
                )
        if not tensors:
            raise FastjacError("graphed: the step takes no tensor; expected tensors on a GPU")
        devices = {t.device for t in tensors}
        if len(devices) > 1 or next(iter(devices)).type != "cuda":
            names = ", ".join(sorted(map(str, devices)))
            raise FastjacError(f"graphed: expected the step's tensors on one GPU; got {names}")
        if any(t.requires_grad for t in tensors):
            raise FastjacError(
                "graphed: an argument requires grad, and its gradient would be lost; expected "
                "arguments without, and .requires_grad_() inside of the step"
            )
        self._stream = torch.cuda.Stream(tensors[0].device)
        self._example, self._structure = [_described(v) for v in given], structure

    def _check(self, given: list[Any], structure: Any) -> None:
        """Raise unless the arguments are like the first ones."""
        if structure != self._structure:
            raise FastjacError(
                f"graphed: expected arguments of the structure {_line(self._structure)}, as in the "
                f"first call, got {_line(structure)}"
            )
        for place, (known, value) in enumerate(zip(self._example, given, strict=True)):
            expected, came = _described(known), _described(value)
            if expected is not came and (type(expected) is not type(came) or expected != came):
                raise FastjacError(
                    f"graphed: argument {place}: expected {expected}, as in the first call, got {came}; "
                    "call the step itself for a batch of another size"
                )

    def _run_beside(self, args: Any, kwargs: Any) -> Any:
        """The step as it is, on the stream that will be captured."""
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        watch = NoSynchronisation(raises=False)
        watching = watch if self.left == 0 else nullcontext()
        with torch.cuda.stream(self._stream), warnings.catch_warnings(), watching:
            warnings.filterwarnings("ignore", ".*constructed with capturable=True")
            results = _detached(self.step(*args, **kwargs))
        if self.left == 0:
            self._waits = watch.refused
        current.wait_stream(self._stream)
        return results

    def _capture(self, given: list[Any]) -> torch.cuda.CUDAGraph:
        """Record the step's kernels on copies of the arguments; nothing of it runs yet."""
        if self._waits is not None:
            raise self._waits
        static = [v.clone() if isinstance(v, Tensor) else v for v in given]
        args, kwargs = torch.utils._pytree.tree_unflatten(static, self._structure)
        before, current = _host_random_state(), torch.cuda.current_stream()
        graph, mode = torch.cuda.CUDAGraph(), NoSynchronisation()
        options: list[tuple[Optimizer, list[dict[str, Any]]]] = []

        def note(optimizer: Optimizer, *_: Any) -> None:
            options.append((optimizer, _options(optimizer)))

        hook = register_optimizer_step_pre_hook(note)
        failure: Exception | None = None
        # A graph of an earlier step that Python collects during a capture breaks the capture off.
        gc.collect()
        collects = gc.isenabled()
        gc.disable()
        try:
            # thread_local: a data loader's threads go on with their own calls.
            with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
                try:
                    with mode:
                        results = _detached(self.step(*args, **kwargs))
                    if mode.refused is not None:  # the step went on
                        raise mode.refused
                except Exception as error:
                    failure = error
                    raise
        except Exception as error:
            if error is failure and not _is_plain(error):
                raise
            if error is not failure:
                _BROKEN.append(graph)
            reason = str(failure or error).strip().splitlines()[0]
            raise FastjacError(
                f"graphed: the step cannot be captured ({reason}); expected a step that neither waits "
                "for the GPU nor uses another stream, and optimisers with capturable=True "
                "(SGD: fused=True). Where CUDA broke the capture off, PyTorch captures no more in this "
                "process"
            ) from (failure or error)
        finally:
            if collects:
                gc.enable()
            hook.remove()
            torch.cuda.set_stream(current)  # a capture that fails leaves its own
        if before != _host_random_state():
            raise FastjacError(
                "graphed: the step draws random numbers on the host (torch's CPU generator, random or "
                "numpy), which a replay would repeat; expected them drawn on the GPU, or passed in"
            )
        self.graph, self._example, self._results = graph, static, results
        self._options = options
        return graph

    def _check_optimizers(self) -> None:
        """Raise if an optimiser has other options than the graph holds."""
        for optimizer, groups in self._options:
            kind = type(optimizer).__name__
            now = _options(optimizer)
            if len(now) != len(groups):
                raise FastjacError(
                    f"graphed: {kind} had {len(groups)} parameter groups in the capture, and has "
                    f"{len(now)}; call graphed again"
                )
            for before, after in zip(groups, now, strict=True):
                for name, value in before.items():
                    came = after.get(name)
                    if came is value or (not isinstance(value, Tensor) and came == value):
                        continue
                    raise FastjacError(
                        f"graphed: {name} of {kind} was {_shown(value, 'a')} in the capture and is now "
                        f"{_shown(came, 'another')}, which a replay does not see; expected a tensor on "
                        "the GPU that is written in place, with capturable=True (SGD: fused=True); or "
                        "call graphed again"
                    )


# Captures that CUDA broke off: PyTorch's allocators still refer to these graphs.
_BROKEN: list[torch.cuda.CUDAGraph] = []


def _is_plain(error: Exception) -> bool:
    """Whether an error of the step is one of PyTorch's or CUDA's, which says nothing of graphs."""
    return isinstance(error, RuntimeError) and not isinstance(error, FastjacError)


class _Kind(NamedTuple):
    """What arguments must have in common, as an error shows it."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    def __repr__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')} {list(self.shape)} on {self.device}"


def _described(value: Any) -> Any:
    """A tensor by its shape, dtype and device; anything else as it is."""
    if isinstance(value, Tensor):
        return _Kind(value.shape, value.dtype, value.device)
    return value


def _detached(results: Any) -> Any:
    return tree_map_only(Tensor, Tensor.detach, results)


def _options(optimizer: Optimizer) -> list[dict[str, Any]]:
    """Each group's options: tensors on a GPU, which must stay the same ones, and numbers."""
    return [
        {name: _option(value) for name, value in group.items() if name != "params"}
        for group in optimizer.param_groups
    ]


def _option(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value if value.is_cuda else float(value)
    return tuple(map(_option, value)) if isinstance(value, tuple | list) else value


def _shown(value: Any, article: str) -> Any:
    return f"{article} tensor" if isinstance(value, Tensor) else value


def _line(structure: Any) -> str:
    return " ".join(str(structure).split())


def _host_random_state() -> tuple[Any, ...]:
    """The states of the generators on the host, which can be compared."""
    numpy = sys.modules.get("numpy")
    numbers = () if numpy is None else numpy.random.get_state()
    return (
        torch.get_rng_state().tolist(),
        random.getstate(),
        [n.tolist() if hasattr(n, "tolist") else n for n in numbers],
    )
