"""Runs a model's own Python, and records the calls that depend on its input."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import get_gradient_edge

from fastjac.engine.call import Call, calling_module, own_lists
from fastjac.engine.hooks import HOOKED, Hooks, leads_to, nodes_behind
from fastjac.engine.memory import MemoryNotes, VersionNotes, clone_on_write, share_memory
from fastjac.engine.rules import fused_rule, rules_for
from fastjac.engine.rules.custom_functions import PIECEWISE_CONSTANT, custom_output
from fastjac.engine.rules.linear_maps import LIKE
from fastjac.engine.rules.views import ViewWrite, is_bound, view_of
from fastjac.engine.site import Site, as_read
from fastjac.engine.unseen import Unseen, in_forward_mode, other_route, overwritten, unseen
from fastjac.errors import FastjacError
from fastjac.fusion.chains import Chain
from fastjac.fusion.mode import (
    LEAVES,
    NESTED,
    Fusion,
    bind_batch_norm,
    function_name,
    in_backward_hook,
    in_checkpoint,
    is_higher_order,
    operation_name,
    takes_native_statistics,
    tensors_in,
    writes_in_place,
)

_MULTI_HEAD_ATTENTION = F.multi_head_attention_forward
_CONVERSIONS = {Tensor.numpy, Tensor.__array__, Tensor.__dlpack__}
_UNVERSIONED = {Tensor.data.__get__, Tensor.untyped_storage}  # a value's memory, by no version
_FLAGS = {Tensor.requires_grad_, Tensor.requires_grad.__set__}
# Calls that compute nothing; an autograd node is of interest for the hooks that it may get.
_SPECIAL = {*_CONVERSIONS, *_FLAGS, Tensor.register_hook, Tensor.grad_fn.__get__}
_CONSTANTS = {
    *(Tensor.detach, torch.detach, Tensor.data.__get__, Tensor.grad.__get__, Tensor.new_tensor),
    *(torch.zeros_like, torch.ones_like, torch.empty_like, torch.full_like, torch.rand_like),
    *(torch.randn_like, Tensor.new_empty, Tensor.new_zeros, Tensor.new_ones, Tensor.new_full),
    *(torch.bernoulli, torch.multinomial, Tensor.bernoulli, Tensor.multinomial),
    Tensor.data.__set__,
}
# Autograd nodes that give their arguments back; the last is Tensor.as_subclass's.
_IDENTITIES = {*HOOKED, "AliasBackward0"}
_GRADIENTS = {torch.autograd.grad, torch.autograd.backward, Tensor.backward}


class Value(NamedTuple):
    """What the tape knows of a tensor that depends on x."""

    number: int
    version: int
    trainable: bool  # whether it also depends on something that the loss is differentiated in
    node: int | None  # its autograd node, where a region without gradients wrote to it
    alive: Any


class Tape(Fusion):
    """A mode that runs a model and records what leads from ``x`` to the values that targets read.

    ``x`` as the model must see it is :attr:`x`: a copy on write, so that the caller's batch stays as it
    is. It requires a gradient, so that whatever a model computes from it carries an autograd graph.
    So a tensor with a graph that no recorded call made was computed where no mode sees: an error.
    Unless the caller's x requires a gradient, that graph ends where a trainable parameter joins in: the
    backward of the loss never reaches x.
    """

    def __init__(
        self,
        model: nn.Module,
        x: Tensor,
        activations: frozenset[str],
        batch_stats: str,
        differentiable: bool,
    ) -> None:
        super().__init__(activations)
        self.model = model
        self.batch_stats, self.differentiable = batch_stats, differentiable
        self.recording = True
        self.calls: list[Call] = []
        self.shapes: list[torch.Size] = []
        self.dtypes: list[torch.dtype] = []
        self.half = False
        self.hooks = Hooks()
        self._values: dict[int, Value] = {}
        # Tensors with a graph that does not lead to x.
        self._constants = VersionNotes()
        with torch.enable_grad():
            trainable = differentiable and x.requires_grad
            self.x = clone_on_write(x if trainable else x.detach().requires_grad_())
        self._key = object()  # of the values in the metadata of the autograd nodes that made them
        # The last nodes before calls without gradients in a checkpoint: those of custom functions.
        self.checkpointed: set[int] = set()
        # What was computed of values without a gradient: the last node before it.
        self._without_gradient = MemoryNotes()
        # The memory of values that a write through ``.data`` would change, and no version count.
        self._unversioned = MemoryNotes()
        self._assign(self.x, trainable)
        # The caller's x, where a graph may lead to it past what the model is given.
        self._origin = x if trainable else None
        self._origin_edge = get_gradient_edge(x) if trainable else None

    # Values.

    def _assign(self, tensor: Tensor, trainable: bool) -> int:
        number = self._number(tensor.shape, tensor.dtype)
        self._hold(tensor, Value(number, tensor._version, trainable, None, None))
        return number

    def _number(self, shape: torch.Size, dtype: torch.dtype) -> int:
        self.shapes.append(shape)
        self.dtypes.append(dtype)
        self.half = self.half or dtype == torch.float16
        return len(self.shapes) - 1

    def assign_outputs(
        self, node: Any, made: list[tuple[torch.Size, torch.dtype]], trainable: bool
    ) -> tuple[int, ...]:
        """Numbers for what an autograd node has made, which no call of the model has read yet."""
        numbers = tuple(self._number(*each) for each in made)
        values = (Value(number, 0, trainable, None, None) for number in numbers)
        node.metadata[self._key] = dict(enumerate(values))
        return numbers

    def outputs_of(self, node: Any) -> dict[int, Value]:
        """The values that an autograd node has made. (A sequence number is one thread's alone.)"""
        return node.metadata.get(self._key, {})

    def _note_value(self, tensor: Tensor, value: Value) -> None:
        values, key = self._values, id(tensor)
        alive = weakref.ref(tensor, lambda _: values.pop(key, None))
        values[key] = Value(*value[:-1], alive)

    def _hold(self, tensor: Tensor, value: Value) -> None:
        self._note_value(tensor, value)
        if tensor.grad_fn is not None:
            made = tensor.grad_fn.metadata.setdefault(self._key, {})
            made[tensor.output_nr] = value

    def value(self, tensor: Any) -> Value | None:
        """What is known of a tensor; None: it does not depend on x."""
        return self._values.get(id(tensor)) if isinstance(tensor, Tensor) else None

    def number_of(self, tensor: Tensor, name: str) -> int | None:
        """The number of a value that ``name`` reads; None where it does not depend on x."""
        found: list[Tensor] = []
        self._scan(name, (tensor,), found)
        return self._values[id(tensor)].number if found else None

    def trains(self, tensor: Any) -> bool:
        """Whether the loss can be differentiated in ``tensor``."""
        if not self.differentiable or not isinstance(tensor, Tensor) or not tensor.requires_grad:
            return False
        value = self._values.get(id(tensor))
        return value is None or value.trainable

    def _scan(self, name: Any, arguments: Iterable[Any], varying: list[Tensor]) -> bool:
        """Collect the arguments that depend on x; whether anything among them all is trainable."""
        trains = False
        for argument in arguments:
            if type(argument) in LEAVES:
                continue
            if isinstance(argument, Tensor):
                value = self._values.get(id(argument)) or self._behind_identity(argument)
                if value is None and _requires_grad(argument):
                    if argument.grad_fn is not None and argument not in self._constants:
                        value = (
                            self._reread(argument)
                            or self._of_custom_function(argument)
                            or self._check_graph(name, argument)
                        )
                    elif argument is self._origin:
                        value = self._by_another_route(name, argument)
                    trains = trains or (value is None and self.differentiable)
                if value is not None:
                    value = self._checked(name, argument, value)
                    varying.append(argument)
                    trains = trains or value.trainable
            elif isinstance(argument, NESTED) and argument:
                if isinstance(argument, dict):
                    argument = argument.values()
                elif isinstance(argument[0], int):
                    continue
                trains = self._scan(name, argument, varying) or trains
        return trains

    def _behind_identity(self, tensor: Tensor) -> Value | None:
        """What is known of a tensor that an identity of autograd's has given a node of its own."""
        node, output = tensor.grad_fn if _has_node(tensor) else None, tensor.output_nr
        if node is None or node.name() not in _IDENTITIES:
            return None
        return self._held(tensor, self.value_behind(node, output))

    def _of_custom_function(self, tensor: Tensor) -> Value | None:
        """What is known of a tensor that a custom autograd function made."""
        return self._held(tensor, custom_output(self, tensor.grad_fn, tensor.output_nr))

    def _held(self, tensor: Tensor, value: Value | None) -> Value | None:
        if value is None:
            return None
        self._hold(tensor, value._replace(version=tensor._version, node=None))
        return self._values[id(tensor)]

    def value_behind(self, node: Any, output: int) -> Value | None:
        """What is known of an output of an autograd node: a call's, or what an identity gives back."""
        value = None
        while node is not None and not hasattr(node, "variable"):
            value = self.outputs_of(node).get(output)
            value = value or custom_output(self, node, output)
            if value is not None or node.name() not in _IDENTITIES:
                break
            if len(node.next_functions) != len(node._input_metadata):
                break  # not all of its arguments are tensors
            node, output = node.next_functions[output]
        return value

    def _checked(self, name: Any, tensor: Tensor, value: Value) -> Value:
        if tensor._version != value.version:
            known = self._reread(tensor) if torch.is_grad_enabled() else value
            if known is None:
                raise overwritten(name, tensor)
            return known
        if value.node is not None and value.node != _node(tensor):
            raise self._unseen(name, tensor)
        return value

    def _reread(self, tensor: Tensor) -> Value | None:
        """A view of a value that was overwritten since it was made: a view of the value as it is."""
        base = tensor._base
        if base is None or is_bound(tensor):
            return None
        whole = self._values.get(id(base))
        if whole is None or whole.version != base._version:
            return None
        moved = whole.node not in (None, _node(base))
        rule = None if moved else view_of(whole.number, base, tensor)
        if rule is None:
            return None
        number = self._assign(tensor, whole.trainable)
        self.calls.append(Call(rule, (number,), True, (), "as_strided", None, []))
        return self._values[id(tensor)]

    def _check_graph(self, name: Any, tensor: Tensor) -> Value | None:
        """Raise if the graph of a tensor that no recorded call made leads to what depends on x.

        The result of a custom function that cannot be recorded is a value, and an error once a target
        depends on it.
        """
        if not self.leads_to_values(tensor.grad_fn):
            if self._origin is not None and leads_to(tensor, self._origin_edge):
                return self._by_another_route(name, tensor)
            self._constants.note(tensor)
            return None
        error = self._unseen(name, tensor)
        if not isinstance(tensor.grad_fn, BackwardCFunction):
            raise error
        number = self._assign(tensor, self.differentiable)
        self.calls.append(Call(Unseen((), error), (number,), True, (), "a function", None, []))
        return self._values[id(tensor)]

    def _unseen(self, name: Any, tensor: Tensor) -> FastjacError:
        return unseen(name, tensor, in_checkpoint() or _node(tensor) in self.checkpointed)

    def check_receivers(self, calls: Iterable[Call]) -> None:
        """Raise if a value that a gradient goes to has another place in autograd's graph by now."""
        for call in calls:
            for receiver in call.receivers:
                known = receiver.source is not None and self.value(receiver.tensor)
                if known and not as_read(known, call, receiver):
                    raise overwritten(call.name, receiver.tensor)

    def _by_another_route(self, name: Any, tensor: Tensor) -> Value:
        """The caller's x, or what was made of it outside: an error where J passes through."""
        number = self._number(tensor.shape, tensor.dtype)
        self._note_value(tensor, Value(number, tensor._version, self.differentiable, None, None))
        self.calls.append(Call(Unseen((), other_route(name)), (number,), True, (), "x", None, []))
        return self._values[id(tensor)]

    def leads_to_values(self, node: Any) -> bool:
        """Whether the graph behind an autograd node, itself included, has the node of a value."""
        return any(map(self.outputs_of, nodes_behind([node])))

    def module_names(self) -> dict[int, str]:
        """The names of the model's modules, by their identity."""
        return {id(module): name for name, module in self.model.named_modules()}

    # Calls.

    def takes_backward_hook(self, tensor: Tensor) -> bool:
        # They fire as they do where x requires no gradient.
        return self.trains(tensor) if self.recording else tensor.requires_grad

    def call(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self.recording or function is Tensor.is_inference:
            return self.run(function, args, kwargs)
        out = self._call(function, args, kwargs)
        if self._unversioned and writes_in_place(function, args, kwargs):
            self._check_write(function, tensors_in(args[:1], kwargs.get("out")))
        return out

    def _call(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if function is Tensor.view_as and in_backward_hook():
            return self.run(function, args, kwargs)  # autograd is about to give it the hook's node
        varying: list[Tensor] = []
        like = function in LIKE  # of others they read the shape or type alone
        trains = self._scan(function, args[:1] if like else args, varying)
        if kwargs and not like:
            trains = self._scan(function, kwargs.values(), varying) or trains
        if not varying:
            if written := self._overwritten(function, args, kwargs):
                return self._run_without_gradient(function, args, kwargs, written)
            return self._run_constant(function, args, kwargs)
        if function in _UNVERSIONED:
            self._unversioned.note(args[0])
        if function in _SPECIAL:
            return self._special(function, args, kwargs)
        if is_higher_order(function):
            raise FastjacError(
                f"the model calls {function_name(function)} on what depends on x, which fastjac does "
                "not take; expected Python's own control flow, or strategy='autograd'"
            )
        if in_forward_mode(function, args, kwargs):
            raise FastjacError(
                f"the model calls {function_name(function)} on what depends on x in forward mode, which "
                "fastjac does not take; strategy='autograd' does"
            )
        if function in _GRADIENTS:
            raise FastjacError(
                f"the model calls {function_name(function)} on what depends on x: a second derivative, "
                "which fastjac does not take; strategy='autograd' does"
            )
        if not torch.is_grad_enabled() or function in _CONSTANTS:
            return self._run_without_gradient(function, args, kwargs, varying)
        if function in (Tensor.detach_, torch.detach_):
            # Gradients of what has been computed of it still go to what it was computed from.
            Site(self, function, trains).copy_before_writing(args[0])
            self._values.pop(id(args[0]))
            return self.run(function, args, kwargs)
        if function is _MULTI_HEAD_ATTENTION:  # of its parts, each has a rule
            return self.run_parts(function, args, kwargs)
        return self._record(function, args, kwargs, varying, trains)

    def _special(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A call on what depends on x that computes nothing."""
        if function in _CONVERSIONS:
            raise FastjacError(
                f"the model converts a tensor {list(args[0].shape)} that depends on x to another "
                "library's array, and its derivative would be lost; expected .detach() before it "
                "where that is meant"
            )
        if function in _FLAGS:
            if not all((*args[1:], *kwargs.values())):
                raise FastjacError(
                    f"the model sets requires_grad of a tensor {list(args[0].shape)} that depends on x "
                    "to False; expected .detach()"
                )
            return args[0]  # it requires a gradient
        if function is Tensor.register_hook:
            number = self._values[id(args[0])].number
            return self.hooks.register(args[0], number, *args[1:], **kwargs)
        node = self.run(function, args, kwargs)
        self.hooks.nodes.append((args[0], node))
        return node

    def check_nodes(self) -> None:
        """Raise if the model has registered a hook on an autograd node of a value."""
        self.hooks.check_nodes(self.outputs_of)

    def _run_constant(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        out = self.run(function, args, kwargs)
        if isinstance(out, Tensor) and _has_node(out):
            self._constants.note(out)
        if self._without_gradient and not torch.is_grad_enabled():
            noted = map(self._without_gradient.find, tensors_in(args, kwargs))
            if any(number is not None for number in noted):
                self._note_without_gradient(function, out)
        return out

    def _run_without_gradient(
        self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], varying: list[Tensor]
    ) -> Any:
        """As autograd has it: the result is a constant, and what is written to keeps its derivative."""
        if in_checkpoint():
            self.checkpointed.add(torch._C._autograd._get_sequence_nr() - 1)
        written = self._overwritten(function, args, kwargs)
        for tensor in written:
            Site(self, function, False).copy_before_writing(tensor)
        known = [(t, self._values[id(t)]) for t in (*varying, *written)]
        known = [(t, value) for t, value in known if value.version == t._version]
        out = self.run(function, args, kwargs)
        for tensor in tensors_in(out):
            if _has_node(tensor) and id(tensor) not in self._values:
                self._constants.note(tensor)  # a sampler's result has a node, of no derivative
        self._note_without_gradient(function, out)
        for tensor, value in known:
            if tensor._version != value.version and not is_bound(tensor):
                self._values[id(tensor)] = value._replace(
                    version=tensor._version, node=_node(tensor)
                )
        return out

    def _overwritten(self, function: Any, args: Any, kwargs: Any) -> list[Tensor]:
        """The values that a call without gradients writes to, also through a view of them."""
        if torch.is_grad_enabled() or not writes_in_place(function, args, kwargs):
            return []
        written = tensors_in(args[:1], kwargs.get("out"))
        bases = [t._base for t in written if t._base is not None]
        whole = {id(t): t for t in (*written, *bases, *map(self._owner, bases))}
        return [t for t in whole.values() if self.value(t) is not None]

    def _note_without_gradient(self, function: Any, out: Any) -> None:
        if operation_name(function) in PIECEWISE_CONSTANT:
            return
        last = torch._C._autograd._get_sequence_nr() - 1
        for tensor in tensors_in(out):
            if _differentiable(tensor):
                self._without_gradient.note(tensor, last)

    def _check_write(self, function: Any, written: list[Tensor]) -> None:
        """Raise if a write through ``.data``, or a storage, has changed what a rule reads."""
        for tensor in written:
            if self._unversioned.find(tensor) is None:
                continue
            for call in self.calls:
                for kept, version in call.kept:
                    if kept._version == version and share_memory(kept, tensor):
                        raise FastjacError(
                            f"{function_name(function)} overwrites a value {list(kept.shape)} that "
                            f"{call.name} needs for its derivative, through .data or its storage, "
                            "which PyTorch does not notice; expected a write to a clone(), or "
                            "strategy='autograd'"
                        )

    def computed_inside(self, node: Any, tensor: Tensor) -> bool:
        """Whether the forward of a custom function, whose ``node`` has saved it, computed ``tensor``."""
        last = self._without_gradient.find(tensor) if _differentiable(tensor) else None
        return last is not None and last >= node._sequence_nr()

    def _record(
        self,
        function: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        varying: list[Tensor],
        trains: bool,
    ) -> Any:
        if self.batch_stats == "frozen" and takes_native_statistics(function, args, kwargs):
            raise FastjacError(
                f"the model takes a batch's statistics by {function_name(function)}, which "
                "batch_stats='frozen' cannot hold constant; expected F.batch_norm, or "
                "batch_stats='batch'"
            )
        if kwargs and kwargs.get("out") is not None:
            raise FastjacError(
                f"{function_name(function)} with out= is not supported; expected its result"
            )
        args, kwargs = own_lists(args), own_lists(kwargs) if kwargs else kwargs
        site = Site(self, function, trains)
        in_place = writes_in_place(function, args, kwargs)
        base = args[0]._base if in_place and isinstance(args[0], Tensor) else None
        owner = None if base is None or self.value(args[0]) is None else self._owner(base)
        for written in (args[0], base, owner) if in_place else ():
            site.copy_before_writing(written)
        whole = None if base is None else self._base_value(base, owner)
        # Other views of a base that is not known are then errors.
        apart = bool(base is not None and whole is None and owner is None and self.value(args[0]))
        for kind in rules_for(function):
            recorded = kind.record(site, *args, **kwargs)
            if recorded is not NotImplemented:
                break
        out, rule, receivers = recorded
        result = args[0] if out is None and in_place else out
        made = tensors_in(result)
        if any(t.is_nested for t in made):
            raise FastjacError(
                f"{function_name(function)} makes a nested tensor of what depends on x; expected padded "
                "tensors and a mask, or strategy='autograd'"
            )
        numbers = tuple(self._assign(t, trains) if self._is_new(t) else None for t in made)
        if not any(n is not None for n in numbers):
            return out
        single = isinstance(result, Tensor)
        name, module = function_name(function), calling_module()
        self.calls.append(Call(rule, numbers, single, receivers, name, module, site.kept))
        if base is not None and not apart:
            sources = numbers if whole is None else (whole.number, *numbers)
            write = ViewWrite.of(sources, base, args[0])
            number = self._assign(base, trains or (whole is not None and whole.trainable))
            self.calls.append(Call(write, (number,), True, (), name, module, []))
        return out

    def _is_new(self, made: Tensor) -> bool:
        """Whether a call's result has a derivative, and is no argument as it was."""
        value = self._values.get(id(made))
        return _differentiable(made) and (value is None or value.version != made._version)

    def _owner(self, base: Tensor) -> Tensor | None:
        """The view of ``base`` as a whole that a call has returned, as F.linear does of 3 dimensions."""
        known = () if id(base) in self._values else self._values.values()
        views = (t for t in (v.alive() for v in known) if t is not None and t._base is base)
        return next((t for t in views if t.numel() == base.numel()), None)

    def _base_value(self, base: Tensor, owner: Tensor | None) -> Value | None:
        if owner is not None and (value := self._values[id(owner)]).version == base._version:
            rule = view_of(value.number, owner, base)
            if rule is not None:
                number = self._assign(base, value.trainable)
                self.calls.append(Call(rule, (number,), True, (), "as_strided", None, []))
        return self._values.get(id(base))

    # Chains.

    def slots(self, chain: Chain) -> int:
        if not (self.differentiable and self.recording and chain.training):
            return 0
        return 2 if self.batch_stats == "batch" else 1

    def chain_input(self, x: Tensor, *others: Tensor | None) -> Tensor:
        if self.recording and not self.trains(x) and any(map(self.trains, others)):
            return x.detach()
        return x

    def may_add(self, chain: Chain, other: Tensor) -> bool:
        if self.recording:
            self._scan(torch.add, (other,), [])
        return not self.recording or id(chain.source) in self._values or self.value(other) is None

    def _batch_norm(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        if self.recording:
            varying: list[Tensor] = []
            self._scan(F.batch_norm, (args, kwargs), varying)
            u = args[0] if args else kwargs["input"]
            if any(t is not u for t in varying):
                return self._affine_apart(*bind_batch_norm(*args, **kwargs))
        y = super()._batch_norm(args, kwargs)
        if self.recording and (pending := self._pending.get(id(y))) is not None:
            pending.chain.module = calling_module()
        return y

    def _affine_apart(
        self,
        u: Tensor,
        mean: Tensor | None,
        var: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        *options: Any,
    ) -> Tensor:
        """A BatchNorm whose weight or bias depends on x: they are applied by calls of their own."""
        y = super()._batch_norm((u, mean, var, None, None, *options), {})
        column = (-1, *[1] * (u.dim() - 2))
        for function, vector in ((torch.mul, weight), (torch.add, bias)):
            if vector is not None:
                vector = self.__torch_function__(Tensor.view, (), (vector, column))
                y = self.__torch_function__(function, (), (y, vector))
        return y

    def computed(self, chain: Chain, value: Tensor) -> None:
        """Record a chain as one call."""
        if not self.recording or not chain.grad_enabled:
            return
        if self.value(chain.source) is None and self.value(chain.added) is None:
            if value.grad_fn is not None:
                self._constants.note(value)
            return
        tensors = (chain.source, chain.added, chain.weight, chain.bias)
        trains = any(map(self.trains, tensors))
        site = Site(self, F.batch_norm, trains)
        rule, receivers = fused_rule(site, chain)
        number = self._assign(value, trains)
        call = Call(rule, (number,), True, receivers, "batch_norm", chain.module, site.kept)
        self.calls.append(call)


def _requires_grad(tensor: Tensor) -> bool:
    """Whether it does; PyTorch refuses to say of a view that was written to without gradients."""
    return (torch.is_grad_enabled() or not tensor._is_view()) and tensor.requires_grad


def _has_node(tensor: Tensor) -> bool:
    return _requires_grad(tensor) and tensor.grad_fn is not None


def _differentiable(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _node(tensor: Tensor) -> int:
    return -1 if tensor.grad_fn is None else tensor.grad_fn._sequence_nr()
