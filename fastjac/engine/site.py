"""A call as its rule sees it while it is recorded."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastjac.engine.call import Call, Kept
from fastjac.engine.rules.base import Receiver
from fastjac.errors import FastjacError
from fastjac.fusion.mode import (
    LEAVES,
    function_name,
    in_checkpoint,
    operation_name,
    writes_in_place,
)

if TYPE_CHECKING:
    from fastjac.engine.tape import Tape, Value

# What writes no values in place, but another shape.
_RESHAPES = {"t_", "transpose_", "swapaxes_", "swapdims_", "squeeze_", "unsqueeze_"}
_RESHAPES |= {"as_strided_", "resize_", "resize_as_"}


@dataclass(slots=True)
class Site:
    """A call as its rule sees it while it is recorded."""

    tape: Tape
    function: Any
    trains: bool
    kept: Kept = field(default_factory=list)

    @property
    def batch_stats(self) -> str:
        return self.tape.batch_stats

    def number(self, tensor: Any) -> int | None:
        """The number of a value; None for what does not depend on x."""
        value = self.tape.value(tensor)
        return None if value is None else value.number

    def varies(self, *tensors: Any) -> bool:
        """Whether one of these depends on x."""
        return any(self.tape.value(t) is not None for t in tensors)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """The call's result. Its graph ends where a trainable tensor joins what depends on x alone."""
        if self.trains and not in_checkpoint():
            in_place = writes_in_place(self.function, args, kwargs)
            if in_place:
                self._cut(args[0])
            rest = tuple(map(self.joined, args[in_place:]))
            args = args[:in_place] + rest
            kwargs = {name: self.joined(value) for name, value in kwargs.items()}
        return self.tape.run(self.function, args, kwargs)

    def _cut(self, written: Tensor) -> None:
        """Let go of the graph of what depends on x alone, before something trainable is written to it.

        PyTorch cannot do so for a view.
        """
        value = self.tape.value(written)
        if value is not None and not value.trainable and not written._is_view():
            written.detach_()

    def joined(self, argument: Any) -> Any:
        """An argument without the graph of what depends on x alone, if something trainable joins in."""
        if not self.trains or type(argument) in LEAVES:
            return argument
        if isinstance(argument, Tensor):
            value = self.tape.value(argument)
            return argument.detach() if value is not None and not value.trainable else argument
        if type(argument) in (tuple, list) and any(isinstance(a, Tensor) for a in argument):
            return type(argument)(map(self.joined, argument))
        return argument

    def keep(self, tensor: Tensor) -> Tensor:
        """``tensor`` without its graph, noting its version: a later change is an error."""
        alias = tensor.detach()
        self.kept.append((alias, alias._version))
        return alias

    def before_writing(self, tensor: Tensor) -> tuple[Tensor, Tensor | None]:
        """What a call is to overwrite, and where a gradient of its old value goes; None: nowhere.

        It is ``tensor``, or a copy of a view, whose result is then to be copied back.
        """
        if not self.tape.trains(tensor):
            return tensor, None
        if in_checkpoint():
            if tensor._is_view():
                raise FastjacError(
                    f"{function_name(self.function)} writes in place under torch.utils.checkpoint to a "
                    f"view {list(tensor.shape)}; use the operation that is not in place"
                )
            return tensor, _Tap.apply(tensor)
        if tensor._is_view() and operation_name(self.function) in _RESHAPES:
            raise FastjacError(
                f"{function_name(self.function)} changes the shape of a view {list(tensor.shape)} in "
                "place; use the operation that is not in place"
            )
        return _Slot.apply(tensor.clone() if tensor._is_view() else tensor)

    def copy_before_writing(self, tensor: Any) -> None:
        """Copy a value that a call is to overwrite, for the calls that made it or read it.

        Gradients of what they read, also as a view of it, go to that as it is before the write.
        """
        value = self.tape.value(tensor)
        calls, taps = self.tape.calls, {}
        whole = tensor if value is None or tensor._base is None else tensor._base
        for i in reversed(range(len(calls) if value is not None else 0)):
            call, number = calls[i], value.number
            if call.unchanged():
                calls[i] = call.by_copies(call.rule.with_copies(tensor))
            if number in call.outputs:
                return
            receivers = []
            for receiver in call.receivers:
                given = receiver.tensor
                same = given is tensor or given._base is whole
                known = self.tape.value(given) if same and receiver.source is not None else None
                if known and as_read(known, call, receiver):
                    if id(given) not in taps:
                        with torch.enable_grad():
                            taps[id(given)] = _Tap.apply(given)
                    receiver = Receiver(taps[id(given)], receiver.source)
                receivers.append(receiver)
            calls[i].receivers = tuple(receivers)

    def receives(self, tensor: Any, source: int | None = None) -> tuple[Receiver, ...]:
        """Where a gradient of ``tensor`` goes, if it is trainable.

        ``source``: which of the rule's sources it is; None for a parameter.
        """
        return (Receiver(tensor, source),) if self.tape.trains(tensor) else ()


def as_read(value: Value, call: Call, receiver: Receiver) -> bool:
    """Whether a value that a gradient of ``call`` goes to is still as the call has read it."""
    number = call.rule.sources[receiver.source]
    return value.number == number and value.version == receiver.tensor._version


class _Slot(torch.autograd.Function):
    """A tensor as it is, and a slot whose gradient is added to its cotangent at this place."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        ctx.mark_dirty(x)
        ctx.set_materialize_grads(False)
        return x, x.new_zeros(()).expand(x.shape).data

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor | None, slot: Tensor | None) -> Tensor | None:
        if cotangent is None or slot is None:
            return slot if cotangent is None else cotangent
        return cotangent + slot


class _Tap(torch.autograd.Function):
    """A slot alone, whose gradient goes to the tensor as it is now, before it is overwritten."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        return x.new_zeros(()).expand(x.shape).data

    @staticmethod
    def backward(ctx: Any, slot: Tensor | None) -> Tensor | None:
        return slot
