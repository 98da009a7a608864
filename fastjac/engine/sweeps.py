"""The two sweeps over a tape: the reverse one gives J, the forward one the gradient of <v, J>.

The loss's gradient through J is the derivative of <v, J>, v = d loss/dJ held constant, and <v, J> is the
derivative of phi along v. So the backward of J is a forward sweep of tangents that starts at v.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastjac.engine.call import Call
from fastjac.engine.crops import Crops, narrow, widen
from fastjac.engine.receptive_field import Region
from fastjac.engine.rules.base import NotLocalError, Receiver
from fastjac.engine.tape import Tape
from fastjac.errors import FastjacError
from fastjac.ops.window_crop import window_crop_adjoint
from fastjac.targets import Head

INPUT = 0  # the number of x


@dataclass
class CropPlan:
    """Where sweeps run on crops: each value's region, and what each call sees of its sources.

    ``masked``: the values of which some call would see what lies outside of the map.
    """

    crops: Crops
    regions: dict[int, Region]
    sizes: dict[int, tuple[int, int]]
    seen: list[list[Region]]
    masked: set[int]

    def read(self, value: int, seen: Region, tensor: Tensor) -> Tensor:
        """The part of a value's crop that a call sees."""
        return narrow(tensor, self.regions[value], seen)

    def write(self, value: int, seen: Region, tensor: Tensor) -> Tensor:
        """The adjoint of :meth:`read`."""
        return widen(tensor, seen, self.regions[value])

    def inside(self, value: int, tensor: Tensor) -> Tensor:
        """``tensor`` with zeros where the value's crop reaches outside its map, if a call sees that."""
        if value not in self.masked:
            return tensor
        return self.crops.inside(tensor, self.regions[value], self.sizes[value])

    def spread(self, value: int, seen: Region, tensor: Tensor) -> Tensor:
        """A crop of what a call sees, as a whole map."""
        return self.crops.scatter(tensor, seen, self.sizes[value])


@dataclass
class Linearization:
    """The derivative of one scalar per sample at x: the calls that it passes, and what they kept.

    ``deltas`` are the cotangents that the forward sweep reads, by a call's place in ``calls``.
    """

    calls: list[Call]
    target: int
    seed: Tensor
    hvp: Callable[[Tensor], Tensor] | None
    plan: CropPlan | None
    dtypes: list[torch.dtype]
    hooks: dict[int, dict[int, Any]]
    half: bool
    head: Receiver | None = None
    deltas: dict[int, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        readers: dict[int, list[int]] = {}
        for i, call in enumerate(self.calls):
            for source in call.rule.sources:
                readers.setdefault(source, []).append(i)
        self._recomputed_by: dict[int, int] = {}
        for i, call in enumerate(self.calls):
            found = readers.get(call.outputs[0], ()) if call.single else ()
            if len(found) == 1 and call.outputs[0] != self.target:
                rule = self.calls[found[0]].rule
                first = rule.sources[0] == call.outputs[0]
                if rule.recomputes_cotangent and rule.needs_delta() and first:
                    self._recomputed_by[i] = found[0]
        self.last_reader = {source: found[-1] for source, found in readers.items()}

    @property
    def receivers(self) -> list[Tensor]:
        """Every tensor that the forward sweep gives a gradient of."""
        found = [r.tensor for call in self.calls for r in call.receivers]
        return found if self.head is None else [*found, self.head.tensor]

    @property
    def region(self) -> Region | None:
        """The part of x that J's values are; None: all of it."""
        return None if self.plan is None else self.plan.regions[INPUT]

    def whole(self, values: Tensor) -> Tensor:
        """J, of x's shape, from its crop."""
        return values if self.plan is None else self.plan.spread(INPUT, self.region, values)

    def cropped(self, v: Tensor) -> Tensor:
        """The adjoint of :meth:`whole`."""
        return v if self.plan is None else self.plan.crops.gather(v, self.region)

    def reverse_sweep(self, store: bool) -> Tensor:
        """J = d(sum of phi)/dx, or its crop; ``store``: keep what the forward sweep reads."""
        plan, cotangents = self.plan, {self.target: self.seed}
        for i in reversed(range(len(self.calls))):
            call = self.calls[i]
            deltas = [None if n is None else cotangents.pop(n, None) for n in call.outputs]
            if plan is not None:
                deltas = [plan.inside(call.outputs[0], deltas[0])]
            if self.hooks:
                for number, cotangent in zip(call.outputs, deltas, strict=True):
                    self._run_hooks(number, cotangent)
            delta = deltas[0] if call.single else deltas
            if store and call.rule.needs_delta() and i not in self._recomputed_by:
                self.deltas[i] = delta
            pulled = call.rule.vjp(delta)
            del delta, deltas
            for place, (source, cotangent) in enumerate(
                zip(call.rule.sources, pulled, strict=True)
            ):
                if cotangent is None:
                    continue
                cotangent = _cast(cotangent, self.dtypes[source])
                if plan is not None:
                    cotangent = plan.write(source, plan.seen[i][place], cotangent)
                known = cotangents.get(source)
                cotangents[source] = cotangent if known is None else known + cotangent
            del pulled
        values = cotangents[INPUT]
        values = values if plan is None else plan.inside(INPUT, values)
        self._run_hooks(INPUT, values)
        return values

    def _run_hooks(self, number: int | None, cotangent: Tensor | None) -> None:
        """Run the hooks that the model has registered on a value."""
        for hook in self.hooks.get(number, {}).values():
            if cotangent is not None and self.plan is not None:
                cotangent = self.plan.spread(number, self.plan.regions[number], cotangent)
            if cotangent is not None:
                hook(cotangent)

    def check_versions(self) -> None:
        """Raise if what a rule reads was overwritten since it was kept."""
        for call in self.calls:
            call.check_versions()

    def delta(self, i: int) -> Any:
        """The cotangent of a call's output, if its rule reads it."""
        if i in self.deltas or not self.calls[i].rule.needs_delta():
            return self.deltas.get(i)
        reader = self._recomputed_by[i]
        return self.calls[reader].rule.vjp(self.delta(reader))[0]

    def forward_sweep(self, v: Tensor, release: bool) -> list[Tensor | None]:
        """The gradient of <v, J> in each receiver; ``release``: let go of what has been read."""
        plan, gradients = self.plan, []
        tangents: dict[int, Any] = {INPUT: v}
        for i, call in enumerate(self.calls):
            rule = call.rule
            given = [tangents[source] for source in rule.sources]
            if plan is not None:
                parts = zip(rule.sources, plan.seen[i], given, strict=True)
                given = [plan.read(*part) for part in parts]
            tangent, found = rule.jvp(given, self.delta(i))
            for receiver, gradient in zip(call.receivers, found, strict=True):
                if gradient is not None and plan is not None and receiver.source is not None:
                    source = rule.sources[receiver.source]
                    gradient = plan.spread(source, plan.seen[i][receiver.source], gradient)
                gradients.append(gradient)
            if plan is not None:
                tangent = plan.inside(call.outputs[0], tangent)
            for number, value in zip(
                call.outputs, [tangent] if call.single else tangent, strict=True
            ):
                if number in self.last_reader or number == self.target:
                    tangents[number] = _cast(value, self.dtypes[number])
            for source in rule.sources:
                if self.last_reader[source] == i and source != self.target:
                    tangents.pop(source, None)
            del given, tangent
            if release:
                self.deltas.pop(i, None)
        if self.head is not None:
            curvature = self.hvp(tangents[self.target])
            if plan is not None:
                curvature = plan.spread(self.target, plan.regions[self.target], curvature)
            gradients.append(curvature)
        return gradients


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """In the type that the value had: autocast mixes types, and so may a rule's product."""
    return x if x.dtype == dtype else x.to(dtype)


class _InputJacobian(torch.autograd.Function):
    """J of several rows; its backward takes v = dL/dJ and runs the forward sweep."""

    @staticmethod
    def forward(
        ctx: Any, rows: list[Linearization], whole: bool, stacked: bool, *receivers: Tensor
    ) -> Tensor:
        stores = len(rows) == 1 and any(ctx.needs_input_grad)
        ctx.rows, ctx.whole, ctx.stacked, ctx.stores = rows, whole, stacked, stores
        found = [_swept(row, stores, whole) for row in rows]
        return torch.stack(found, 1) if stacked else found[0]

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[Any, ...]:
        if torch.is_grad_enabled():
            raise FastjacError(
                "fastjac.with_jacobian differentiates once; got a backward with create_graph=True. "
                "strategy='autograd' differentiates the model's outputs further"
            )
        ctx.saved_tensors  # noqa: B018  none, but PyTorch's error where a backward has freed the graph
        release = not torch._C._autograd._get_current_graph_task_keep_graph()
        rows = ctx.rows
        rows[0].check_versions()
        total: list[Tensor | None] = [None] * (len(ctx.needs_input_grad) - 3)
        for k, row in enumerate(rows):
            if not ctx.stores:
                row = replace(row, calls=list(row.calls), deltas={}, hooks={})
                with _plain_arithmetic(v.device):
                    row.reverse_sweep(True)
            found = _pushed(row, v[:, k] if ctx.stacked else v, ctx.whole, release)
            for i, gradient in enumerate(found):
                if gradient is not None:
                    total[i] = gradient if total[i] is None else total[i] + gradient
        if release:
            ctx.rows = None
        return None, None, None, *total


def _swept(row: Linearization, store: bool, whole: bool) -> Tensor:
    row.check_versions()
    with _plain_arithmetic(row.seed.device):
        values = row.reverse_sweep(store)
        return row.whole(values) if whole else values


def _pushed(row: Linearization, v: Tensor, whole: bool, release: bool) -> list[Tensor | None]:
    """The forward sweep; where values are float16, of a tangent of at most 1, which cannot overflow."""
    with _plain_arithmetic(v.device):
        v = row.cropped(v) if whole else v
        if not row.half:
            return row.forward_sweep(v, release)
        largest = v.abs().amax() if v.numel() else v.new_zeros(())
        largest = largest.to(torch.promote_types(v.dtype, torch.float32))
        scale = torch.where(largest.isfinite() & (largest > 0), largest, 0)
        scale = _largest_of_all(scale, row)
        scale = torch.where(scale > 0, scale, 1)
        found = row.forward_sweep((v / scale).to(v.dtype), release)
        scaled = iter(
            torch._foreach_mul([g.to(scale.dtype) for g in found if g is not None], scale)
        )
        return [None if g is None else next(scaled) for g in found]


def _largest_of_all(scale: Tensor, row: Linearization) -> Tensor:
    """The largest scale of the processes that the forward sweep adds sums of tangents with."""
    groups = {call.rule.processes() for call in row.calls} - {None}
    if len(groups) > 1:
        raise FastjacError(
            "float16 with SyncBatchNorms of different process groups is not supported; expected one "
            "group, or bfloat16"
        )
    for group in groups:
        dist.all_reduce(scale, dist.ReduceOp.MAX, group)
    return scale


def _plain_arithmetic(device: torch.device) -> Any:
    """The sweeps choose their types themselves: those that the forward had."""
    if not torch.is_autocast_enabled(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


@dataclass
class InputJacobian:
    """J of one network: ``values``, of x's shape or the crop that holds all of its support."""

    values: Tensor
    row: Linearization | None  # None where the double backward made J, whole
    is_whole: bool

    def whole(self) -> Tensor:
        """J, of the input's shape."""
        return self.values if self.is_whole or self.row is None else self.row.whole(self.values)

    def start(self) -> Tensor | None:
        """The first row and column of the crop that ``values`` are, ``[B, 2]``; None: all of x."""
        if self.is_whole or self.row is None or self.row.plan is None or self.row.region is None:
            return None
        return self.row.plan.crops.start(self.row.region)


def input_jacobian(rows: list[Linearization], stacked: bool, whole: bool = True) -> InputJacobian:
    """J as the output of one autograd function, differentiable once in what is trainable."""
    receivers = rows[0].receivers
    for row in rows:
        row.calls = [c.with_rule(c.rule, c.outputs, _placeless(c.receivers)) for c in row.calls]
        row.head = None if row.head is None else Receiver(None, row.head.source)
    values = _InputJacobian.apply(rows, whole, stacked, *receivers)
    if not values.requires_grad:
        for row in rows:
            row.calls, row.hvp = [], None  # what the forward left to a backward
    return InputJacobian(values, rows[0], whole)


def _placeless(receivers: tuple[Receiver, ...]) -> tuple[Receiver, ...]:
    """Receivers without their tensors, which are autograd's from here on."""
    return tuple(Receiver(None, r.source) for r in receivers)


def linearize(
    tape: Tape, number: int, seed: Tensor, head: Head | None, tensor: Tensor | None, strategy: str
) -> Linearization:
    """The derivative of a scalar with this ``seed`` at the value ``number``, which ``tensor`` holds.

    ``strategy``: ``"dense"``, ``"local"``, or ``"auto"``: local where that is less than half of x.
    """
    hvp = None if head is None else head.hvp
    curved = hvp is not None and tensor is not None and tape.trains(tensor)
    receiver = Receiver(tensor) if curved else None
    calls = _leading_to(tape.calls, number)
    tape.check_receivers(calls)
    plan = None
    if head is not None and head.position is not None:
        if strategy != "dense":
            calls, plan = _on_crops(tape, calls, number, head, strategy)
        if plan is None:
            size = tape.shapes[number][2:]
            seed = window_crop_adjoint(seed, head.position, size)
            hvp = _whole_hvp(head, size)
    elif strategy == "local":
        raise _not_local("the target reads the whole of its tensor")
    return Linearization(
        *(calls, number, seed, hvp, plan, tape.dtypes, tape.hooks.by_value, tape.half),
        head=receiver,
    )


def _whole_hvp(head: Head, size: torch.Size) -> Callable[[Tensor], Tensor] | None:
    """A window's curvature on the whole map."""
    if head.hvp is None:
        return None
    region, crops = Region.window(head.side), Crops(head.position, (1, 1))

    def hvp(tangent: Tensor) -> Tensor:
        return crops.scatter(head.hvp(crops.gather(tangent, region)), region, tuple(size))

    return hvp


def _leading_to(calls: list[Call], number: int) -> list[Call]:
    """The calls that a value depends on, in order."""
    needed, found = {number}, []
    for call in reversed(calls):
        if not needed.isdisjoint(call.outputs):
            found.append(call)
            needed.update(call.rule.sources)
    return found[::-1]


def _not_local(reason: object) -> FastjacError:
    return FastjacError(f"strategy='local' needs a target with local support; global: {reason}")


def _on_crops(
    tape: Tape, calls: list[Call], number: int, head: Head, strategy: str
) -> tuple[list[Call], CropPlan | None]:
    """The calls on the crops that the window sees; as they are where ``"auto"`` finds maps better."""
    try:
        regions, seen = _regions(tape, calls, number, head.side)
        if len(tape.shapes[INPUT]) != 4 or regions[INPUT].axis != 2:
            raise NotLocalError("the input is no image [B, C, H, W]")
    except NotLocalError as reason:
        if strategy == "local":
            raise _not_local(reason) from None
        return calls, None
    height, width = tape.shapes[INPUT][2:]
    if strategy == "auto" and 2 * regions[INPUT].area >= height * width:
        return calls, None
    h, w = tape.shapes[number][2:]
    crops = Crops(head.position, (h - head.side + 1, w - head.side + 1))
    sizes = {n: region.map_size(tape.shapes[n]) for n, region in regions.items()}
    for call in calls:
        call.check_versions()  # crops are copies, whose versions tell nothing
    cropped = [call.by_copies(call.rule.crop(crops, regions[call.outputs[0]])) for call in calls]
    crops.forget()
    masked = {n for call in calls if not call.rule.stays_inside for n in call.rule.sources}
    return cropped, CropPlan(crops, regions, sizes, seen, masked | {INPUT})


def _regions(
    tape: Tape, calls: list[Call], number: int, side: int
) -> tuple[dict[int, Region], list[list[Region]]]:
    """The region of every value that the window sees, and what each call sees of its sources."""
    regions, seen = {number: Region.window(side)}, []
    for call in reversed(calls):
        if not call.single or len(tape.shapes[call.outputs[0]]) != 4:
            raise NotLocalError(f"{describe(call, tape)}: its output is not a feature map")
        try:
            parts = call.rule.input_regions(regions[call.outputs[0]])
            for source, part in zip(call.rule.sources, parts, strict=True):
                regions[source] = part.hull(regions[source]) if source in regions else part
        except (NotLocalError, ValueError) as reason:
            raise NotLocalError(f"{describe(call, tape)}: {reason}") from None
        seen.append(parts)
    return regions, seen[::-1]


def describe(call: Call, tape: Tape) -> str:
    """A call as an error names it."""
    module = None if call.module is None else call.module()
    name = tape.module_names().get(id(module)) if module is not None else None
    return f"{call.name} in module {name!r}" if name else call.name
