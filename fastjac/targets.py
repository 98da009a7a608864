"""Targets: the scalars phi of a network whose input gradient J = d(sum of phi)/dx is taken.

A target gives phi from the model's output and one layer's features, and nothing about how J is
computed. Subclass :class:`Target` for a new one, or wrap a function in :class:`Scalar`.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, Literal

import torch
from torch import Tensor

from fastjac.errors import FastjacError, is_int
from fastjac.ops.attention_window import attention_window, attention_window_slope


@dataclass(frozen=True)
class Head:
    """The derivatives of phi at the tensor that it reads, in closed form.

    Attributes:
        reads: which tensor, the model's ``"output"`` or the layer's ``"features"``.
        grad: d(sum of phi)/d(that tensor), of its shape; ``[B, C, side, side]`` for a window.
        hvp: the Hessian of the sum of phi times a tangent, both of ``grad``'s shape; None where phi
            is linear (or piecewise linear).
        position: ``[B, 2]`` int64, the window's first row and column; None: phi reads the whole tensor.
        side: the window's height and width.

    >>> import torch
    >>> z = torch.tensor([[1.0, -2.0]])
    >>> squares = Head("output", grad=2 * z, hvp=lambda tangent: 2 * tangent)  # phi = sum of z^2
    >>> squares.hvp(torch.ones(1, 2))
    tensor([[2., 2.]])
    """

    reads: Literal["output", "features"]
    grad: Tensor
    hvp: Callable[[Tensor], Tensor] | None = None
    position: Tensor | None = None
    side: int | None = None


class Target:
    """One scalar per sample, or K of them: phi, ``[B]`` or ``[B, K]``.

    A subclass defines :meth:`scalar`, and ``layer`` where phi reads a layer's features. The other
    methods have defaults.

    Attributes:
        layer: the layer whose output is ``features``, named as ``named_modules()`` names it, or None.
        normalize: what ``JacobianMatching(normalize=None)`` takes for this target.
        features_alone: whether phi reads nothing of the model's output, so that what runs behind the
            layer need not be recorded.

    The methods' ``features`` is the layer's output, a tensor; None where there is no layer.

    >>> import torch
    >>> class Energy(Target):
    ...     '''phi_i = log sum_k exp(output[i, k])'''
    ...     def scalar(self, output, features, y):
    ...         return output.logsumexp(1)
    >>> Energy().scalar(torch.zeros(2, 4).exp(), None, None)
    tensor([2.3863, 2.3863])
    """

    layer: str | None = None
    normalize: bool = False
    features_alone: bool = False

    def scalar(self, output: Tensor, features: Any, y: Any) -> Tensor:
        """phi, ``[B]`` or ``[B, K]``; differentiable in ``output`` and ``features``."""
        raise FastjacError(f"{type(self).__name__} must define scalar(output, features, y)")

    def head(self, output: Tensor, features: Any, y: Any) -> Head | None:
        """The derivatives of phi in closed form; None: those of the operations in :meth:`scalar`."""
        return None

    def for_teacher(self) -> Target:
        """The same target for the teacher, whose layer may have another name."""
        return self

    def placed(self, features: Any) -> Target:
        """The same target with its choices on ``features`` (an argmax, say) fixed."""
        return self

    def paired(self, teacher: Target, features_t: Any, y: Any) -> Target:
        """The student's target, after the teacher's forward.

        ``teacher``: the teacher's target, :meth:`placed` on its features ``features_t``.
        """
        return self

    @property
    def fills_labels(self) -> bool:
        """Whether :meth:`labels` gives others than it got."""
        return False

    def labels(self, y: Any, teacher_logits: Tensor) -> Any:
        """y for student and teacher in ``JacobianMatching``, once the teacher's logits are known."""
        return y

    def drawn(self) -> Target:
        """The same target with its random numbers fixed."""
        return self

    def check_scalar(self, phi: Any, batch: int) -> Tensor:
        """``phi`` if it is floating-point ``[B]`` or ``[B, K]`` with B = ``batch``; an error else."""
        expected = f"{type(self).__name__}: scalar must be [B] or [B, K] with B = {batch}"
        if not isinstance(phi, Tensor):
            raise FastjacError(f"{expected}; got {type(phi).__name__}")
        if phi.dim() not in (1, 2) or phi.shape[0] != batch:
            advice = ""
            if not phi.dim():
                advice = "; a loss gives one for each sample with reduction='none'"
            elif phi.dim() > 2 and phi.shape[0] == batch:
                advice = "; .flatten(1).sum(1) makes one of each sample's"
            raise FastjacError(f"{expected}; got {list(phi.shape)}{advice}")
        if not phi.is_floating_point():
            raise FastjacError(
                f"{type(self).__name__}: scalar must be floating-point; got {_name(phi.dtype)}"
            )
        return phi


def check_targets(target: Any) -> tuple[Target, ...]:
    """A target, or a tuple of targets, as a tuple; an error for anything else.

    >>> check_targets(Logits([0, 2]))
    (Logits(indices=(0, 2)),)
    """
    targets = target if isinstance(target, tuple) else (target,)
    if not targets:
        raise FastjacError("target: expected a Target or a tuple of Targets; got an empty tuple")
    for each in targets:
        if not isinstance(each, Target):
            kind = each.__name__ + " itself" if isinstance(each, type) else type(each).__name__
            raise FastjacError(
                "target: expected a Target (LabelLogit(), AttentionWindow(layer), "
                f"Scalar(function), ...) or a tuple of them; got {kind}"
            )
    return targets


@dataclass(frozen=True)
class LabelLogit(Target):
    """phi_i = logits[i, y_i]: the pre-softmax output of the correct class (distillation).

    Logits ``[B, classes]``, labels y ``[B]`` int64. ``unlabelled="teacher"``: in ``JacobianMatching``, a
    label below 0 stands for an image without one, for which both networks take the class that the
    teacher's logits are largest for; by default it is an error.

    >>> import torch
    >>> logits = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    >>> LabelLogit().scalar(logits, None, torch.tensor([1, 0]))
    tensor([2., 3.])
    """

    unlabelled: Literal["error", "teacher"] = "error"

    def __post_init__(self) -> None:
        if self.unlabelled not in ("error", "teacher"):
            raise FastjacError(
                f"LabelLogit: unlabelled is 'error' or 'teacher'; got {self.unlabelled!r}"
            )

    @property
    def fills_labels(self) -> bool:
        return self.unlabelled == "teacher"

    def labels(self, y: Any, teacher_logits: Tensor) -> Any:
        if not self.fills_labels or not isinstance(y, Tensor) or y.dtype != torch.int64:
            return y
        _check_logits("LabelLogit", teacher_logits)
        if y.shape != teacher_logits.shape[:1] or y.device != teacher_logits.device:
            return y  # check() says what is wrong
        return torch.where(y < 0, teacher_logits.argmax(1), y)

    def scalar(self, output: Tensor, features: Tensor | None, y: Any) -> Tensor:
        self.check(output, y)
        return output.gather(1, y[:, None])[:, 0]

    def head(self, output: Tensor, features: Tensor | None, y: Any) -> Head:
        self.check(output, y)
        return Head("output", torch.zeros_like(output.detach()).scatter_(1, y[:, None], 1))

    def check(self, logits: Any, y: Any) -> None:
        """Raise unless ``y`` labels every row of ``logits``.

        The range of the labels is checked on the CPU alone: on a GPU it would make the host wait, and
        there the gather itself fails.
        """
        if y is None:
            raise FastjacError("LabelLogit needs the labels y; got None")
        _check_logits("LabelLogit", logits)
        if not isinstance(y, Tensor) or y.dtype != torch.int64 or y.shape != logits.shape[:1]:
            raise FastjacError(
                f"labels y: expected int64 [{len(logits)}], got {_labels_and_advice(y, logits)}"
            )
        if y.device != logits.device:
            raise FastjacError(
                f"labels y are on {y.device}; the model's logits are on {logits.device}"
            )
        if y.device.type == "cpu":
            _check_range(y, logits.shape[1])


@dataclass(frozen=True)
class AttentionWindow(Target):
    """The brightest window of an attention map (transfer).

    With Z = features at ``layer``, ``[B, C, h, w]``: A = mean over channels of ``|Z|^power``; P =
    A averaged over k x k windows, stride 1, no padding, k = max(1, floor(h * window)); phi = P at one
    position per sample, P's argmax. ``anchor="teacher"``: the teacher's argmax, for both networks
    (mapped by relative coordinates if the maps differ in size); ``"own"``: each network's own.
    (Srinivas & Fleuret, ICML 2018.)

    ``layer`` and ``teacher_layer`` (default: the same) are named as ``named_modules()`` names them.
    ``power`` is 1, or at least 2 (between them phi has no second derivative where a feature is 0).

    >>> import torch
    >>> z = torch.zeros(1, 2, 10, 10)
    >>> z[0, :, 7, 3] = 2.0
    >>> target = AttentionWindow("layer1")
    >>> target.side(z), target.position(z).tolist()
    (2, [[6, 2]])
    >>> target.scalar(z, z, None)  # 2^2 in one of four places
    tensor([1.])
    """

    layer: str = field()  # required: without field() the base class's None would be the default
    window: float = 1 / 5
    power: float = 2
    anchor: Literal["teacher", "own"] = "teacher"
    teacher_layer: str | None = None

    # Where the window stands, as at(), placed() and paired() set it; None: P's argmax.
    _start: Tensor | None = field(default=None, init=False, repr=False, compare=False)
    _source: Tensor | None = field(default=None, init=False, repr=False, compare=False)
    _checked: bool = field(default=False, init=False, repr=False, compare=False)

    # No fields: no annotations.
    normalize = True
    features_alone = True

    def __post_init__(self) -> None:
        if not isinstance(self.layer, str):
            raise FastjacError(
                f"AttentionWindow: layer is a name of named_modules(); got {self.layer!r}"
            )
        if not (isinstance(self.window, Real) and 0 < self.window <= 1):
            raise FastjacError(
                f"AttentionWindow: window is a share of the map's height, in (0, 1]; got {self.window!r}"
            )
        if not (isinstance(self.power, Real) and (self.power == 1 or 2 <= self.power < math.inf)):
            raise FastjacError(
                f"AttentionWindow: power must be 1 or at least 2; got {self.power!r}"
            )
        if self.anchor not in ("teacher", "own"):
            raise FastjacError(
                f"AttentionWindow: anchor is 'teacher' or 'own'; got {self.anchor!r}"
            )

    def scalar(self, output: Tensor, features: Tensor, y: Any) -> Tensor:
        pooled = self.pooled(features)
        start = self.start(features)
        index = start[:, :1] * pooled.shape[2] + start[:, 1:]
        return pooled.flatten(1).gather(1, index)[:, 0]

    def head(self, output: Tensor, features: Tensor, y: Any) -> Head:
        z, side = features.detach(), self.side(features)
        start = self.start(z)
        grad, hess_diag = attention_window_slope(z, start, side, self.power)
        hvp = None if self.power == 1 else lambda tangent: hess_diag * tangent
        return Head("features", grad, hvp, start, side)

    def for_teacher(self) -> AttentionWindow:
        """The same target on the teacher's layer."""
        target = AttentionWindow(self.teacher_layer or self.layer, self.window, self.power)
        return target if self._start is None else target.at(self._start)

    def at(self, position: Tensor) -> AttentionWindow:
        """The same target with its window at ``position``: first row and column, ``[B, 2]`` int64.

        The position is checked when the features are there; on a GPU, without making the host wait, by
        a device-side assertion, after which the process cannot use the GPU. In ``JacobianMatching`` with
        ``anchor="teacher"`` it is a position on the teacher's map.

        >>> import torch
        >>> z = torch.arange(100.0).view(1, 1, 10, 10).sqrt()
        >>> AttentionWindow("layer1").at(torch.tensor([[0, 0]])).scalar(z, z, None)
        tensor([5.5000])
        """
        return self._with_start(position, checked=False)

    def placed(self, features: Tensor) -> AttentionWindow:
        """The same target with its window fixed where it stands on ``features``."""
        return self._with_start(self.start(features), checked=True)

    def paired(self, teacher: Target, features_t: Tensor, y: Any) -> AttentionWindow:
        """The student's target: for ``anchor="teacher"``, where the teacher's window stands."""
        if self.anchor == "own":
            return self
        if not isinstance(teacher, AttentionWindow):
            raise FastjacError(
                "AttentionWindow(anchor='teacher') needs an AttentionWindow for the teacher; got "
                f"{type(teacher).__name__}"
            )
        source = torch.empty(features_t.shape, device="meta")  # its size alone is needed
        return self._with_start(teacher.start(features_t), checked=True, source=source)

    def start(self, features: Tensor) -> Tensor:
        """The window's first row and column on ``features``, ``[B, 2]`` int64."""
        if self._start is None:
            return self.position(features)
        if self._source is not None:
            return self.transfer(self._start, self._source, features)
        if not self._checked:
            self._check_start(self._start, features)
        return self._start

    def side(self, features: Tensor) -> int:
        """k, the window's height and width in the map's pixels."""
        if features.dim() != 4:
            raise FastjacError(
                f"layer {self.layer!r} is not a feature map: expected [B, C, h, w], "
                f"got {list(features.shape)}"
            )
        h, w = features.shape[2:]
        k = max(1, math.floor(h * self.window + 1e-9))
        if k > w:
            raise FastjacError(
                f"layer {self.layer!r}: a {k}x{k} window ({self.window:.3g} of the height) "
                f"is larger than the {h}x{w} map"
            )
        return k

    def pooled(self, features: Tensor) -> Tensor:
        """P, ``[B, h - k + 1, w - k + 1]``."""
        k = self.side(features)
        magnitude = self.magnitude(features).mean(1, True)
        pooled: Tensor = torch.ops.aten.avg_pool2d(magnitude, k, 1)
        return pooled[:, 0]

    def position(self, features: Tensor) -> Tensor:
        """P's argmax, ``[B, 2]`` int64: the first row and column of the window.

        P is summed in float32 or wider here, also for features of less.
        """
        return attention_window(features.detach(), self.side(features), self.power)[0]

    def transfer(self, position: Tensor, source: Tensor, destination: Tensor) -> Tensor:
        """``position`` on the map ``source``, as a position on the map ``destination``.

        The centre of the window keeps its relative coordinates; the window stays inside the map.
        """
        k_from, k_to = self.side(source), self.side(destination)
        if source.shape[2:] == destination.shape[2:]:
            return position
        axes = []
        for axis, (n_from, n_to) in enumerate(
            zip(source.shape[2:], destination.shape[2:], strict=True)
        ):
            twice_centre = (2 * position[:, axis] + k_from) * n_to  # in units of 1 / n_from
            start = (twice_centre - k_to * n_from).div(2 * n_from, rounding_mode="floor")
            axes.append(start.clamp(0, n_to - k_to))
        return torch.stack(axes, 1)

    def magnitude(self, z: Tensor) -> Tensor:
        """``|z|^power``."""
        if self.power == 1:
            return z.abs()
        return z.pow(self.power) if self.power % 2 == 0 else z.abs().pow(self.power)

    def _with_start(
        self, start: Tensor, checked: bool, source: Tensor | None = None
    ) -> AttentionWindow:
        target = object.__new__(type(self))  # the class is frozen
        target.__dict__.update(self.__dict__, _start=start, _source=source, _checked=checked)
        return target

    def _check_start(self, position: Any, features: Tensor) -> None:
        k, expected = self.side(features), f"position: expected int64 [{len(features)}, 2]"
        if not isinstance(position, Tensor):
            raise FastjacError(f"{expected}, got {type(position).__name__}")
        if position.dtype != torch.int64 or position.shape != (len(features), 2):
            raise FastjacError(f"{expected}, got {position.dtype} {list(position.shape)}")
        if position.device != features.device:
            raise FastjacError(
                f"position is on {position.device}; the features of layer {self.layer!r} are on "
                f"{features.device}"
            )
        if not len(position):
            return
        last = [features.shape[2] - k, features.shape[3] - k]
        if position.device.type == "cuda":  # checked there, without making the host wait
            for axis in range(2):
                column = position[:, axis]
                torch._assert_async(((column >= 0) & (column <= last[axis])).all())
            return
        low, high = position.amin(0).tolist(), position.amax(0).tolist()
        if min(low) < 0 or high[0] > last[0] or high[1] > last[1]:
            raise FastjacError(f"position: expected 0 to {last}, got {low} to {high}")


@dataclass(frozen=True)
class Scalar(Target):
    """phi = ``function(output, y)``, ``[B]`` or ``[B, K]``: any differentiable function.

    With ``layer``, the function gets that layer's features in the place of the output. ``y`` is passed
    on as it came. The function must treat each sample alone: J is the gradient of the sum of phi.

    >>> import torch
    >>> from torch.nn.functional import cross_entropy
    >>> target = Scalar(lambda logits, y: cross_entropy(logits, y, reduction="none"))
    >>> target.scalar(torch.zeros(2, 4), None, torch.tensor([1, 3]))
    tensor([1.3863, 1.3863])
    """

    function: Callable[[Tensor, Any], Tensor]
    layer: str | None = None

    def __post_init__(self) -> None:
        if not callable(self.function):
            raise FastjacError(
                "Scalar: function must be callable as function(output, y); got "
                f"{type(self.function).__name__}"
            )
        if self.layer is not None and not isinstance(self.layer, str):
            raise FastjacError(f"Scalar: layer is a name of named_modules(); got {self.layer!r}")

    def scalar(self, output: Tensor, features: Any, y: Any) -> Tensor:
        return self.function(output if self.layer is None else features, y)


@dataclass(frozen=True)
class Logits(Target):
    """phi = the logits ``[B, classes]``, or those at ``indices``: ``[B, K]``, so J is ``[B, K, ...]``.

    ``indices``: ints, a sequence, a tensor or an array; None: all of them.

    >>> import torch
    >>> Logits([2, 0]).scalar(torch.tensor([[1.0, 2.0, 3.0]]), None, None)
    tensor([[3., 1.]])
    """

    indices: Sequence[int] | None = None

    def __post_init__(self) -> None:
        if self.indices is None:
            return
        given: Any = self.indices
        indices = given.tolist() if hasattr(given, "tolist") else given
        if (
            not isinstance(indices, Sequence)
            or not indices
            or not all(is_int(k) and k >= 0 for k in indices)
        ):
            raise FastjacError(
                f"Logits: indices must be ints from 0, at least one, or None; got {self.indices!r}"
            )
        object.__setattr__(self, "indices", tuple(map(int, indices)))

    def scalar(self, output: Tensor, features: Tensor | None, y: Any) -> Tensor:
        _check_logits("Logits", output)
        if self.indices is None:
            return output
        if max(self.indices) >= output.shape[1]:
            raise FastjacError(
                f"Logits: expected indices from 0 to {output.shape[1] - 1}, got {max(self.indices)}"
            )
        # Of a subclass, a mode's FakeTensor say, an index is one as well, and not to be kept.
        index = _index if type(output) is Tensor else _index.__wrapped__
        return output.index_select(1, index(self.indices, output.device))


@dataclass(frozen=True)
class Projection(Target):
    """phi = ``n`` random projections of a sample's output, ``[B, n]``.

    ``phi_ik = <w_ik, output_i>`` with w ~ N(0, 1) / sqrt(n), so that over the draws the mean of
    sum_k ||J_ik||^2 is ``||d output_i / dx_i||_F^2``, for the cost of n gradients. (Hoffman, Roberts &
    Yaida, "Robust Learning with Jacobian Regularization", 2019, with unit vectors.)

    ``output``: ``[B, ...]``. The rows are float32 numbers, drawn anew for each call from ``generator``,
    on its device; None: PyTorch's generator of the output's device, the only one that a CUDA graph
    takes. :meth:`drawn` keeps them, so outputs of one shape on one device, student's and teacher's, get
    the same rows.

    >>> import torch
    >>> target = Projection(2, torch.Generator().manual_seed(0)).drawn()
    >>> phi = target.scalar(torch.ones(3, 5), None, None)
    >>> phi.shape, torch.equal(phi, target.scalar(torch.ones(3, 5), None, None))
    (torch.Size([3, 2]), True)
    """

    n: int
    generator: torch.Generator | None = None

    # The rows of a target that is drawn(), by their outputs' shape and device; None: drawn anew.
    _drawn: dict[tuple[torch.Size, torch.device], Tensor] | None = field(
        default=None, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        if not is_int(self.n) or self.n < 1:
            raise FastjacError(f"Projection: n must be a positive int; got {self.n!r}")

    def scalar(self, output: Tensor, features: Tensor | None, y: Any) -> Tensor:
        if not isinstance(output, Tensor) or output.dim() < 2:
            came = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise FastjacError(f"Projection needs an output [B, ...]; the model gave {came}")
        flat = output.flatten(1)
        return (self.rows(flat) * flat[:, None]).sum(2)

    def rows(self, flat: Tensor) -> Tensor:
        """w, ``[B, n, D]``, for outputs ``[B, D]``."""
        key = (flat.shape, flat.device)
        rows = None if self._drawn is None else self._drawn.get(key)
        if rows is None:
            make = self.generator
            shape = (flat.shape[0], self.n, flat.shape[1])
            device = flat.device if make is None else make.device
            rows = torch.randn(shape, generator=make, device=device, dtype=torch.float32)
            rows = (rows / math.sqrt(self.n)).to(flat.device)
            if self._drawn is not None:
                self._drawn[key] = rows
        return rows.to(flat.dtype)

    def drawn(self) -> Projection:
        """The same target with its rows fixed."""
        if self._drawn is not None:
            return self
        target = copy.copy(self)
        object.__setattr__(target, "_drawn", {})  # the class is frozen
        return target


def _check_range(y: Tensor, classes: int) -> None:
    if len(y) and not 0 <= int(y.min()) <= int(y.max()) < classes:
        raise FastjacError(
            f"labels y: expected 0 to {classes - 1}, got {int(y.min())} to {int(y.max())}"
            + (
                "; leave out unlabelled rows, or LabelLogit(unlabelled='teacher') in JacobianMatching"
                if int(y.min()) < 0
                else ""
            )
        )


def _labels_and_advice(y: Any, logits: Tensor) -> str:
    """What ``y`` is, and how labels come of it where that is clear."""
    if not isinstance(y, Tensor):
        return f"{type(y).__name__}; torch.as_tensor makes a tensor of a list or an array"
    advice = ""
    if y.shape == logits.shape:
        advice = "; y.argmax(1) gives the classes of one-hot or soft labels"
    elif y.shape == (len(logits), 1):
        advice = "; y.flatten() drops the second dimension"
    elif y.shape == logits.shape[:1] and y.is_floating_point():
        advice = "; for regression, Scalar takes any function of the output"
    elif y.shape == logits.shape[:1]:
        advice = "; y.long() converts"
    return f"{_name(y.dtype)} {list(y.shape)}{advice}"


@functools.lru_cache(maxsize=64)
def _index(indices: tuple[int, ...], device: torch.device) -> Tensor:
    """``indices`` on the device, where they are copied once: a copy makes the host wait."""
    with torch.inference_mode(False):
        return torch.tensor(indices, device=device)


def _check_logits(name: str, logits: Any) -> None:
    if not isinstance(logits, Tensor):
        raise FastjacError(
            f"{name} needs logits [B, classes]; the model gave {type(logits).__name__}: "
            "name its logits with output="
        )
    if logits.dim() != 2:
        raise FastjacError(f"{name} needs logits [B, classes]; the model gave {list(logits.shape)}")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
