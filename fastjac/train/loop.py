"""The loop: epochs of steps, an evaluation, a checkpoint."""

from __future__ import annotations

import contextlib
import math
import time
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset, default_collate
from tqdm import tqdm

from fastjac.data import ImageData, class_balanced
from fastjac.errors import FastjacError, TrainingFailed, first_line, notice
from fastjac.models import ModelSpec
from fastjac.progress import progress_bar
from fastjac.train import interrupts, ranks
from fastjac.train.auxiliary import AuxiliaryHeads
from fastjac.train.batches import LOST_LOADER, Batch, Batches, lost_loader
from fastjac.train.build import (
    build_average,
    build_optimizer,
    describe,
    lr_factor,
    pick_device,
)
from fastjac.train.changes import ELSEWHERE
from fastjac.train.checkpoint import capture, position, restore
from fastjac.train.compilation import compile_networks
from fastjac.train.files import CannotWrite, RunFolder, SeenFolder
from fastjac.train.objective import Objective
from fastjac.train.options import RunOptions
from fastjac.train.step import OutOfMemory, Step, warn_of_batch_norm
from fastjac.train.tally import Tally
from fastjac.train.teacher_cache import weights_key

CHECK_EVERY = 20  # steps between looks at the loss, each of which makes the host wait for a GPU


def evaluate(
    model: nn.Module, images: Dataset, classes: int, batch_size: int, workers: int = 0
) -> dict[str, float]:
    """``loss`` (mean cross-entropy) and ``accuracy`` (in [0, 1]) of ``model`` on ``images``.

    Runs in eval mode and leaves the model in the mode it was in. Of several processes each takes a
    part of the images; the result is that of all.
    """
    from torchmetrics.classification import MulticlassAccuracy  # seconds to import

    device = next(model.parameters()).device
    accuracy = MulticlassAccuracy(
        classes, average="micro", validate_args=False, sync_on_compute=False
    ).to(device)
    loss = torch.zeros((), device=device)
    mode = model.training
    model.eval()
    part = images
    if ranks.count() > 1:
        ranks.share_buffers(model)
        part = Subset(images, range(ranks.rank(), len(images), ranks.count()))
    with torch.no_grad():
        for x, y in interrupts.read(DataLoader(part, batch_size, num_workers=workers)):
            x, y = x.to(device), y.to(device)
            logits = model(x)
            accuracy.update(logits, y)
            loss += nn.functional.cross_entropy(logits.float(), y, reduction="sum")
    model.train(mode)
    right = round(accuracy.compute().item() * len(part)) if len(part) else 0
    if ranks.count() == 1:
        return {"loss": loss.item() / len(images), "accuracy": right / len(images)}
    total = ranks.add_up(torch.stack([loss.double(), loss.new_tensor(right).double()]))
    return dict(zip(("loss", "accuracy"), (total / len(images)).tolist(), strict=True))


class Training:
    """One run: the network, what it is trained with, and how far it is.

    Two runs with the same options give the same weights, bit for bit on a CPU, and so does one that
    was cut off and resumed.
    """

    def __init__(
        self,
        options: RunOptions,
        data: ImageData,
        model: nn.Module,
        spec: ModelSpec,
        objective: Objective,
    ) -> None:
        self.options, self.data, self.spec = options, data, spec
        self.device = pick_device(options.device)
        if options.cuda_graphs and self.device.type != "cuda":
            raise FastjacError(f"--cuda-graphs needs a GPU; the device is {self.device}")
        layout = torch.channels_last if options.channels_last else torch.contiguous_format
        self.layout = layout
        self.model = model.to(self.device, memory_format=layout)
        objective.to(self.device, memory_format=layout)
        if options.aux_weight:
            objective = AuxiliaryHeads(objective, model, options.aux_weight)
        self.objective = objective
        images, self.subset = data.train, None
        if options.samples_per_class is not None:
            indices = class_balanced(
                data.labels, options.samples_per_class, options.seed, data.classes
            )
            unlabelled = [index for index, label in enumerate(data.labels) if label < 0]
            images = Subset(data.train, [*indices, *unlabelled])
            self.subset = {
                "dataset": data.name,
                "samples_per_class": options.samples_per_class,
                "seed": options.seed,
                "indices": indices,
            }
        self.batches = Batches(options, images, len(data.classes), self.device.type == "cuda")
        teachers = [net.model for net in objective.networks if net.role == "teacher"]
        self.teacher = weights_key(teachers[0]) if teachers else None
        # Layers that are trained for the objective's terms alone.
        self.heads = objective.heads
        trained = nn.ModuleList([model, self.heads])
        self.optimizer = build_optimizer(options, trained)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lr_factor(options, self.batches.steps)
        )
        self.step = Step(options, objective, trained, self.optimizer, self.device)
        self.ema = build_average(options, model)
        self.epoch, self.history, self.best = 0, [], -1.0
        self._shown: dict[str, Any] = {}  # beside the bar
        # Within an epoch: steps done, the rate at its start, its metrics, the time it took before.
        self.done, self.rate, self.tally, self.seconds_before = 0, 0.0, Tally(self.device), 0.0
        kind = RunFolder if ranks.is_first() else SeenFolder
        self.folder = kind(options.output, str(options.experiment))
        self.source = self.folder.last

    def run(self, bar: bool = True) -> dict[str, Any]:
        """Train to the last epoch; the last row of the history.

        Writes the run's folder; shows a bar if it may and the standard error is a terminal. Raises
        :class:`TrainingFailed` if the loss is not finite, if memory runs out, a file cannot be
        written or another process ends, and KeyboardInterrupt if interrupted; each says what is saved.
        """
        options, folder = self.options, self.folder
        folder.check()
        if options.tensorboard:
            _summary_writer()  # before anything is written
        if options.resume:
            restore(self)
        elif folder.checkpoints():
            raise FastjacError(
                f"{folder.path} holds a run: --resume goes on with it, --experiment names another"
            )
        elif folder.finished():  # of which the checkpoints were removed
            raise FastjacError(
                f"{folder.path} holds a finished run; --experiment names another folder"
            )
        unused = self.try_once()
        self._agree()
        try:
            self.step.parallelise(unused)
            return self._nothing_left() if self.epoch >= options.epochs else self._run(bar)
        except (CannotWrite, OutOfMemory) as error:
            raise TrainingFailed(f"{error}; {self._held()}") from error
        except (RuntimeError, OSError, EOFError, ranks.Ended) as error:
            held = self._held(f" of {options.epochs}, --resume goes on from there")
            if ranks.lost_another(error):
                raise TrainingFailed(f"{ranks.LOST}; {held}") from error
            if options.workers and lost_loader(error):
                raise TrainingFailed(f"{LOST_LOADER}: {first_line(error)}; {held}") from error
            if isinstance(error, OSError):
                raise TrainingFailed(f"{first_line(error)}; {held}") from error
            raise
        except KeyboardInterrupt as stop:
            held = self._held(f" of {options.epochs}, --resume goes on from there")
            raise KeyboardInterrupt(f"interrupted; {held}") from stop
        finally:
            folder.close()

    def _agree(self) -> None:
        """Raise if the processes would not train the same; none writes before all are here."""
        options = {k: v for k, v in asdict(self.options).items() if k not in ELSEWHERE}
        ranks.agree(
            {
                "options": options,
                "labels": [int(label) for label in self.data.labels],
                "classes": list(self.data.classes),
                "test images": len(self.data.test),
                "checkpoints": [self.epoch, self.done],
            }
        )

    def _run(self, bar: bool) -> dict[str, Any]:
        options = self.options
        if options.torchcompile:
            blank = torch.zeros(2, self.data.channels, self.data.size, self.data.size)
            compile_networks(self.objective.networks, blank.to(self.device))
        self._open_folder()
        with self._bar(bar) as progress, self._events() as events:
            while self.epoch < options.epochs:
                try:
                    row = self._epoch(progress)
                except FastjacError as error:  # an image that cannot be read, say
                    raise FastjacError(f"{str(error).strip()}; {self._held()}") from error
                for name, value in row.items():
                    if events is not None and name != "epoch":
                        events.add_scalar(name, value, row["epoch"])
        return self._finish(self.history[-1])

    def _open_folder(self) -> None:
        """Make the folder; bring its files to where the run is."""
        options, folder = self.options, self.folder
        folder.lock()
        folder.open(asdict(options) | {"epochs": max(options.epochs, self.epoch)})
        if self.subset is not None:
            folder.save_subset(self.subset)
        if self.epoch < options.epochs:
            folder.unfinish()
        if options.resume:
            folder.promote(self.source)
            folder.write_metrics(self.history)
        else:
            self._save()

    def _nothing_left(self) -> dict[str, Any]:
        """End a run that was stopped at or after the last epoch now wanted; train nothing."""
        held = f"epoch {self.epoch}"
        if self.done:
            held = f"step {self.done} of epoch {self.epoch + 1}"
        notice(f"nothing to train: {self.source} holds {held}, --epochs is {self.options.epochs}")
        self._open_folder()
        if self.done:  # a network of no epoch; the checkpoint stays at its step
            self._test(row := dict(self.history[-1]))
            return self._finish(row)
        if "test_accuracy" not in (row := self.history[-1]):
            best = self._test(row)
            self._save(best)
        return self._finish(row)

    def _finish(self, result: dict[str, Any]) -> dict[str, Any]:
        """Export the weights; ``result``, which has their score."""
        about = describe(self.spec, self.data) | {"accuracy": result["test_accuracy"]}
        if self.teacher is not None:
            about["teacher"] = self.teacher
        self.folder.save_model(self.tested.state_dict(), about)
        return result

    @property
    def tested(self) -> nn.Module:
        """The network that is evaluated and exported."""
        return self.model if self.ema is None else self.ema.module

    def _test(self, row: dict[str, Any]) -> bool:
        """Evaluate, into ``row``; whether it is the best so far."""
        test = evaluate(
            self.tested,
            self.data.test,
            len(self.data.classes),
            self.step.size or max(256, self.options.batch_size),
            self.options.workers,
        )
        row |= {f"test_{name}": value for name, value in test.items()}
        best = test["accuracy"] > self.best
        self.best = max(self.best, test["accuracy"])
        return best

    def try_once(self) -> bool:
        """Evaluate and train on two test images: what does not fit is found before any writing.

        Of the step, nothing stays: no gradient, statistic or random number. Returns whether it gave
        some trainable parameter no gradient.
        """
        count = min(2, self.batches.smallest, self.step.size or 2)
        x, y = default_collate([self.data.test[i % len(self.data.test)] for i in range(count)])
        x = x.to(self.device).contiguous(memory_format=self.layout)
        y = y.to(self.device)
        buffers = {name: value.clone() for name, value in self.model.named_buffers()}
        forks = hasattr(torch.get_device_module(self.device), "get_rng_state_all")
        devices = [self.device] if forks else []  # else it draws from torch's own generator
        with torch.random.fork_rng(devices, device_type=self.device.type):
            self.model.eval()
            with torch.no_grad():
                self.objective(x, y)
            self.model.train()
            try:
                with torch.no_grad():
                    logits = self.model(x)
            except (RuntimeError, ValueError, AssertionError) as error:
                raise FastjacError(
                    f"{self.spec.model} cannot be trained on a batch {list(x.shape)}: "
                    f"{str(error).strip().splitlines()[0]}"
                ) from error
            if not isinstance(logits, Tensor):
                raise FastjacError(
                    f"{self.spec.model} returns {type(logits).__name__} in training; expected logits"
                )
            if self.step.size is not None:
                warn_of_batch_norm(self.model)
            self.step.gradient(x, y, 1.0)
        unused = any(p.grad is None for p in self.model.parameters() if p.requires_grad)
        self.optimizer.zero_grad()
        with torch.no_grad():
            for name, value in self.model.named_buffers():
                value.copy_(buffers[name])
        return unused

    def _epoch(self, bar: tqdm) -> dict[str, Any]:
        """Train for what is left of an epoch, evaluate if it is time to, save."""
        self.started, every = time.perf_counter(), self.options.checkpoint_steps
        if self.done == 0:
            self.tally, self.seconds_before = Tally(self.device), 0.0
            self.rate = float(self.optimizer.param_groups[0]["lr"])
        self.model.train()
        for batches in self.batches.epoch(self.done):
            for piece in self.step(batches, self._place):
                self.tally.add(piece)
            self.scheduler.step()
            if self.ema is not None:
                self.ema.update(self.model, self.scheduler.last_epoch)
            self.done += 1
            bar.update()
            last = self.done == self.batches.steps
            save = every is not None and self.done % every == 0 and not last
            if self.done % CHECK_EVERY == 0 or save or last:
                tally = self.tally.joint()
                self._check(tally.loss())
                self._shown = {
                    "epoch": self.epoch + 1,
                    "loss": f"{tally.loss():.3g}",
                    "train": f"{100 * tally.accuracy():.1f}%",
                }
                bar.set_postfix(**self._shown, **self._last_test())
            if save:
                self._save()
        self.epoch, self.done = self.epoch + 1, 0
        row = {"epoch": self.epoch, "lr": self.rate, **self.tally.joint().row()}
        best = False
        try:
            if self.epoch % self.options.val_interval == 0 or self.epoch == self.options.epochs:
                best = self._test(row)
        except (FastjacError, KeyboardInterrupt):  # the epoch is trained all the same
            if ranks.count() == 1:
                self._keep(row, best)
            raise
        self._keep(row, best)
        bar.set_postfix(**(self._shown | self._last_test()))
        return row

    def _keep(self, row: dict[str, Any], best: bool) -> None:
        """Save the end of an epoch."""
        row["seconds"] = round(self.seconds(), 3)
        self.history.append(row)
        self._save(best)

    def _place(self, x: Tensor, y: Tensor, number: int) -> Batch:
        """Batch ``number`` of the step, on the device, mixed and smoothed as the options say."""
        # A copy even on the CPU, where the images are mixed in place.
        x = x.to(self.device, non_blocking=True, copy=self.batches.mixup is not None)
        x = x.contiguous(memory_format=self.layout)
        y = y.to(self.device, non_blocking=True)
        return self.batches.soften(x, y, self.done * self.options.grad_accum + number)

    def seconds(self) -> float:
        """The time that the epoch has taken."""
        return self.seconds_before + time.perf_counter() - self.started

    def _save(self, best: bool = False) -> None:
        self.folder.save_state(capture(self), best, self.options.keep_checkpoints)

    def _held(self, more: str = "") -> str:
        """What is saved, and ``more`` about it, for the error that the run ends with."""
        ranks.ignore_end()
        path, held = position(self.folder)
        return f"{path} holds {held}{more}" if held else "nothing is saved"

    def _check(self, loss: float) -> None:
        if not math.isfinite(loss):
            raise TrainingFailed(
                f"the loss is {loss} in epoch {self.epoch + 1}, by step {self.done}; "
                f"{self._held()}; try a lower --lr"
            )

    def _last_test(self) -> dict[str, str]:
        scores = [row["test_accuracy"] for row in self.history if "test_accuracy" in row]
        return {"test": f"{100 * scores[-1]:.1f}%"} if scores else {}

    def _bar(self, shown: bool) -> tqdm:
        return progress_bar(
            shown=shown and ranks.is_first(),
            total=self.options.epochs * self.batches.steps,
            initial=self.epoch * self.batches.steps + self.done,
            desc=str(self.options.experiment),
            unit="step",
        )

    @contextlib.contextmanager
    def _events(self):
        if not (self.options.tensorboard and ranks.is_first()):
            yield None
            return
        with _summary_writer()(self.folder.path) as writer:
            yield writer


def _summary_writer() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise FastjacError("--tensorboard needs the package tensorboard") from error
    return SummaryWriter
