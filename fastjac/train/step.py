"""One step of the optimiser: the gradient of some batches, in pieces where asked for, and the update."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fastjac.engine import synchronised_batch_norms
from fastjac.errors import FastjacError, TrainingFailed, notice
from fastjac.graphs import graphed
from fastjac.train import ranks
from fastjac.train.batches import Batch
from fastjac.train.objective import Objective
from fastjac.train.objective import Step as StepResult
from fastjac.train.options import RunOptions
from fastjac.train.randomness import get_states, set_states


class OutOfMemory(TrainingFailed):
    """A step did not fit into memory, nor did its pieces where it may be cut."""


@dataclass(frozen=True)
class Piece:
    """What was computed of some images: labels, logits, the loss and its terms; no gradients."""

    y: Tensor
    logits: Tensor
    terms: dict[str, Tensor]


class Step:
    """The step on the mean of the loss over all images of its batches.

    Each batch is cut into pieces of at most ``size`` images, of nearly the same number each; a piece
    weighs by its share of the images. ``size`` None: batches are not cut.
    """

    def __init__(
        self,
        options: RunOptions,
        objective: Objective,
        model: nn.Module,
        optimizer: Optimizer,
        device: torch.device,
    ) -> None:
        self.options, self.objective, self.model = options, objective, model
        self.optimizer, self.device = optimizer, device
        self.amp_dtype = getattr(torch, options.amp_dtype)
        scaled = options.amp and self.amp_dtype == torch.float16
        self.scaler = torch.amp.GradScaler(device.type, enabled=scaled)
        self.auto = options.micro_batch == "auto"
        self.size = None if self.auto else options.micro_batch
        self.parallel: nn.parallel.DistributedDataParallel | None = None
        self.graphed = graphed(self._whole) if options.cuda_graphs else None
        if ranks.count() > 1 and (options.cuda_graphs or self.auto):
            chosen = "--cuda-graphs" if options.cuda_graphs else "--micro-batch auto"
            raise FastjacError(f"{chosen} is for one process; there are {ranks.count()}")

    def parallelise(self, unused: bool) -> None:
        """Average the gradients over the processes, if there are several.

        ``unused``: some parameters get no gradient.
        """
        if ranks.count() == 1:
            return
        self.parallel = nn.parallel.DistributedDataParallel(
            _Together(self.objective, self.model), find_unused_parameters=unused
        )
        self.objective = self.parallel
        if self.options.sync_bn:  # after the wrapper, which refuses it on CPUs
            nn.SyncBatchNorm.convert_sync_batchnorm(self.model)

    def __call__(
        self, batches: Sequence[Batch], place: Callable[[Tensor, Tensor, int], Batch]
    ) -> list[Piece]:
        """Take the step. ``place(x, y, n)`` gives batch n of it on the device, the same each time."""
        if self.graphed is not None:
            ((x, y),) = batches
            x, y = place(x, y, 0)
            logits, terms = self.graphed(x, y)
            return [Piece(y, logits, terms)]
        try:
            pieces = None
            while pieces is None:
                pieces = self._pieces_that_fit(batches, place)
            self.update()  # not tried again: it may have moved some of the weights
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            advice = "" if self.auto else "; try --micro-batch auto"
            raise OutOfMemory(f"out of memory: {_first_line(error)}{advice}") from error
        return pieces

    def _pieces_that_fit(
        self, batches: Sequence[Batch], place: Callable[[Tensor, Tensor, int], Batch]
    ) -> list[Piece] | None:
        """The gradient; for ``auto``, None if memory ran out, with all as it was but for ``size``."""
        if not self.auto:
            return self._pieces(batches, place)
        random = get_states(self.device)
        buffers = {name: value.clone() for name, value in self.model.named_buffers()}
        try:
            return self._pieces(batches, place)
        except RuntimeError as error:
            largest = max(len(y) for _, y in batches)
            if not is_out_of_memory(error) or self.size == 1 or largest == 1:
                raise
        # Out of the handler, since the error's traceback holds the tensors of the step.
        self.optimizer.zero_grad()
        getattr(torch.get_device_module(self.device), "empty_cache", int)()
        set_states(random, self.device)
        with torch.no_grad():
            for name, value in self.model.named_buffers():
                value.copy_(buffers[name])
        self.size = -(-min(largest, self.size or largest) // 2)
        notice(f"out of memory; --micro-batch auto goes on with pieces of {self.size}")
        warn_of_batch_norm(self.model)
        return None

    def _pieces(
        self, batches: Sequence[Batch], place: Callable[[Tensor, Tensor, int], Batch]
    ) -> list[Piece]:
        """The gradient, piece by piece."""
        images = sum(len(y) for _, y in batches)
        self.optimizer.zero_grad()
        done = []
        for number, batch in enumerate(batches):
            x, y = place(*batch, number)
            count = 1 if self.size is None else -(-len(x) // self.size)
            parts = list(zip(x.tensor_split(count), y.tensor_split(count), strict=True))
            for k, part in enumerate(parts, 1):
                last = number + 1 == len(batches) and k == len(parts)
                with nullcontext() if last or self.parallel is None else self.parallel.no_sync():
                    done.append(self.gradient(*part, len(part[0]) / images))
        return done

    def _whole(self, x: Tensor, y: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The step on one batch that lies on the device; the logits and the terms."""
        self.optimizer.zero_grad()
        piece = self.gradient(x, y, 1.0)
        self.update()
        return piece.logits, piece.terms

    def gradient(self, x: Tensor, y: Tensor, share: float) -> Piece:
        """Add the gradient of ``share`` times the loss on ``x``."""
        autocast = torch.autocast(self.device.type, self.amp_dtype, enabled=self.options.amp)
        with synchronised_batch_norms(), autocast:
            out = self.objective(x, y)
        self.scaler.scale(out.loss if share == 1 else out.loss * share).backward()
        terms = {"loss": out.loss, **out.terms}
        terms = {name: value.detach() for name, value in terms.items()}
        return Piece(y, out.logits.detach(), terms)

    def update(self) -> None:
        """Move the weights by the gradient, clipped where asked for."""
        if (norm := self.options.clip_grad) is not None:
            self.scaler.unscale_(self.optimizer)
            parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
            nn.utils.clip_grad_norm_(parameters, norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()


class _Together(nn.Module):
    """An objective as DistributedDataParallel takes it, with the network alone to keep alike.

    What it gives beside the loss has no graph.
    """

    def __init__(self, objective: Objective, model: nn.Module) -> None:
        super().__init__()
        self.objective = objective.__call__  # no module of this one, or the teacher would be
        self.model = model

    def forward(self, x: Tensor, y: Tensor) -> StepResult:
        out = self.objective(x, y)
        terms = {name: value.detach() for name, value in out.terms.items()}
        return StepResult(out.loss, out.logits.detach(), terms)


def warn_of_batch_norm(model: nn.Module) -> None:
    """Say once that pieces of a batch are not the batch, where they are not."""
    if any(isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training for m in model.modules()):
        notice("with --micro-batch, BatchNorm takes the statistics of each piece, not of the batch")


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an accelerator's memory, or that of the host, was too small for a tensor."""
    return isinstance(error, torch.OutOfMemoryError) or (
        "DefaultCPUAllocator: can't allocate memory" in str(error)
    )


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
