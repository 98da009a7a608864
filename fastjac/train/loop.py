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

from fastjac.data import ImageData, class_balanced, epoch_batches
from fastjac.errors import FastjacError, TrainingFailed, notice
from fastjac.graphs import graphed
from fastjac.models import ModelSpec, load_weights
from fastjac.models.weights import read_checkpoint
from fastjac.train.build import build_optimizer, describe, lr_factor, pick_device
from fastjac.train.files import RunFolder
from fastjac.train.objective import Objective
from fastjac.train.options import RunOptions, changed

CHECK_EVERY = 20  # steps between looks at the loss, each of which makes the host wait for a GPU


def evaluate(
    model: nn.Module, images: Dataset, classes: int, batch_size: int, workers: int = 0
) -> dict[str, float]:
    """``loss`` (mean cross-entropy) and ``accuracy`` (in [0, 1]) of ``model`` on ``images``.

    Runs in eval mode and leaves the model in the mode it was in.
    """
    from torchmetrics.classification import MulticlassAccuracy  # seconds to import

    device = next(model.parameters()).device
    accuracy = MulticlassAccuracy(classes, average="micro", validate_args=False).to(device)
    loss = torch.zeros((), device=device)
    mode = model.training
    model.eval()
    with torch.no_grad():
        for x, y in DataLoader(images, batch_size, num_workers=workers):
            x, y = x.to(device), y.to(device)
            logits = model(x)
            accuracy.update(logits, y)
            loss += nn.functional.cross_entropy(logits.float(), y, reduction="sum")
    model.train(mode)
    return {"loss": loss.item() / len(images), "accuracy": accuracy.compute().item()}


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
        if isinstance(objective, nn.Module):
            objective.to(self.device, memory_format=layout)
        self.objective = objective
        self.images, self.subset = data.train, None
        if options.samples_per_class is not None:
            indices = class_balanced(
                data.labels, options.samples_per_class, options.seed, data.classes
            )
            self.images = Subset(data.train, indices)
            self.subset = {
                "dataset": data.name,
                "samples_per_class": options.samples_per_class,
                "seed": options.seed,
                "indices": indices,
            }
        self.steps = len(self._batches(torch.Generator()))
        # Layers that are trained for the objective's terms alone.
        self.heads = getattr(objective, "heads", nn.ModuleDict())
        self.optimizer = build_optimizer(options, nn.ModuleList([model, self.heads]))
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lr_factor(options, self.steps)
        )
        self.amp_dtype = getattr(torch, options.amp_dtype)
        scaled = options.amp and self.amp_dtype == torch.float16
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=scaled)
        self.step = graphed(self._step) if options.cuda_graphs else self._step
        self.order = torch.Generator().manual_seed(options.seed)
        self.epoch, self.history, self.best = 0, [], -1.0
        self.folder = RunFolder(options.output, str(options.experiment))

    def _batches(self, generator: torch.Generator) -> list[list[int]]:
        options = self.options
        return epoch_batches(len(self.images), options.batch_size, options.epoch_steps, generator)

    def run(self, bar: bool = True) -> dict[str, Any]:
        """Train to the last epoch; the last row of the history.

        Writes the run's folder; shows a bar if it may and the standard error is a terminal. Raises
        :class:`TrainingFailed` if the loss is not finite, and KeyboardInterrupt, with a message that
        says what is saved, if interrupted.
        """
        options, folder = self.options, self.folder
        if options.resume:
            self._resume()
        elif folder.last.is_file():
            raise FastjacError(
                f"{folder.path} holds a run: --resume goes on with it, --experiment names another"
            )
        self.try_once()
        if self.epoch >= options.epochs:
            return self._nothing_left()
        folder.open(asdict(options))
        if self.subset is not None:
            folder.save_subset(self.subset)
        if self.epoch == 0:
            folder.save_state(self._state(), best=False)
        else:
            folder.write_metrics(self.history)
        if options.torchcompile:
            self.model.compile()
        try:
            with self._bar(bar) as progress, self._events() as events:
                while self.epoch < options.epochs:
                    row = self._epoch(progress)
                    for name, value in row.items():
                        if events is not None and name != "epoch":
                            events.add_scalar(name, value, row["epoch"])
        except KeyboardInterrupt as stop:
            raise KeyboardInterrupt(
                f"interrupted; {folder.last} holds epoch {self.epoch} of {options.epochs}, "
                "--resume goes on from there"
            ) from stop
        return self._finish()

    def _nothing_left(self) -> dict[str, Any]:
        """End a run that was stopped at or after the last epoch now wanted; train nothing."""
        notice(
            f"nothing to train: {self.folder.last} holds epoch {self.epoch}, --epochs is "
            f"{self.options.epochs}"
        )
        if "test_accuracy" not in (row := self.history[-1]):
            best = self._test(row)
            self.folder.save_state(self._state(), best)
        return self._finish()

    def _finish(self) -> dict[str, Any]:
        """Export the weights; the last row of the history."""
        result = self.history[-1]
        about = describe(self.spec, self.data) | {"accuracy": result["test_accuracy"]}
        self.folder.save_model(self.model.state_dict(), about)
        return result

    def _test(self, row: dict[str, Any]) -> bool:
        """Evaluate, into ``row``; whether it is the best so far."""
        test = evaluate(
            self.model,
            self.data.test,
            len(self.data.classes),
            max(256, self.options.batch_size),
            self.options.workers,
        )
        row |= {f"test_{name}": value for name, value in test.items()}
        best = test["accuracy"] > self.best
        self.best = max(self.best, test["accuracy"])
        return best

    def try_once(self) -> None:
        """Evaluate and train on two test images: what does not fit is found before any writing.

        Of the step, nothing stays: no gradient, statistic or random number.
        """
        count = min(2, len(self._batches(torch.Generator())[0]))
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
            with torch.autocast(self.device.type, self.amp_dtype, enabled=self.options.amp):
                loss = self.objective(x, y).loss
            loss.backward()
        self.optimizer.zero_grad()
        with torch.no_grad():
            for name, value in self.model.named_buffers():
                value.copy_(buffers[name])

    def _epoch(self, bar: tqdm) -> dict[str, Any]:
        """Train for one epoch, evaluate if it is time to, save."""
        start, seen, correct = time.perf_counter(), 0, torch.zeros((), device=self.device)
        sums: dict[str, Tensor] = {}
        batches = self._batches(self.order)
        self.model.train()
        loader = DataLoader(
            self.images,
            batch_sampler=batches,
            num_workers=self.options.workers,
            pin_memory=self.device.type == "cuda",
            generator=self.order,
        )
        rate = float(self.optimizer.param_groups[0]["lr"])
        for step, (x, y) in enumerate(loader, 1):
            x = x.to(self.device, non_blocking=True).contiguous(memory_format=self.layout)
            y = y.to(self.device, non_blocking=True)
            logits, terms = self.step(x, y)
            self.scheduler.step()
            seen += len(y)
            correct += (logits.argmax(1) == y).sum()
            for name, value in terms.items():
                sums[name] = sums.get(name, 0) + value.float() * len(y)
            bar.update()
            if step % CHECK_EVERY == 0 or step == len(batches):
                self._check(sums["loss"] / seen, step)
                bar.set_postfix(
                    epoch=self.epoch + 1,
                    loss=f"{sums['loss'].item() / seen:.3g}",
                    train=f"{100 * correct.item() / seen:.1f}%",
                    **self._last_test(),
                )
        self.epoch += 1
        row = {"epoch": self.epoch, "lr": rate}
        row |= {f"train_{name}": value.item() / seen for name, value in sums.items()}
        row["train_accuracy"] = correct.item() / seen
        best = False
        if self.epoch % self.options.val_interval == 0 or self.epoch == self.options.epochs:
            best = self._test(row)
        row["seconds"] = round(time.perf_counter() - start, 3)
        self.history.append(row)
        self.folder.save_state(self._state(), best)
        return row

    def _step(self, x: Tensor, y: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Take one step; the logits, and the loss and its terms, detached."""
        with torch.autocast(self.device.type, self.amp_dtype, enabled=self.options.amp):
            out = self.objective(x, y)
        self.optimizer.zero_grad()
        self.scaler.scale(out.loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        terms = {"loss": out.loss, **out.terms}
        return out.logits.detach(), {name: value.detach() for name, value in terms.items()}

    def _check(self, loss: Tensor, step: int) -> None:
        if not math.isfinite(loss.item()):
            raise TrainingFailed(
                f"the loss is {loss.item()} in epoch {self.epoch + 1}, by step {step}; "
                f"{self.folder.last} holds epoch {self.epoch}; try a lower --lr"
            )

    def _last_test(self) -> dict[str, str]:
        scores = [row["test_accuracy"] for row in self.history if "test_accuracy" in row]
        return {"test": f"{100 * scores[-1]:.1f}%"} if scores else {}

    def _bar(self, shown: bool) -> tqdm:
        return tqdm(
            total=self.options.epochs * self.steps,
            initial=self.epoch * self.steps,
            desc=str(self.options.experiment),
            unit="step",
            dynamic_ncols=True,
            disable=None if shown else True,  # None: unless it is a terminal
        )

    @contextlib.contextmanager
    def _events(self):
        if not self.options.tensorboard:
            yield None
            return
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise FastjacError("--tensorboard needs the package tensorboard") from error
        with SummaryWriter(self.folder.path) as writer:
            yield writer

    def _state(self) -> dict[str, Any]:
        # None where the device draws from torch's own generator.
        states = getattr(torch.get_device_module(self.device), "get_rng_state_all", list)()
        return {
            "about": describe(self.spec, self.data),
            "options": asdict(self.options),
            "model": self.model.state_dict(),
            "heads": self.heads.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "epoch": self.epoch,
            "best": self.best,
            "history": self.history,
            "rng": {
                "torch": torch.get_rng_state(),
                "devices": {self.device.type: states},
                "order": self.order.get_state(),
            },
        }

    def _resume(self) -> None:
        path = self.folder.last
        if not path.is_file():
            raise FastjacError(f"nothing to resume: {path} is missing")
        state = read_checkpoint(path)
        if "rng" not in state:
            raise FastjacError(f"{path} is not a checkpoint of a run")
        if state["about"] != (mine := describe(self.spec, self.data)):
            parts = [
                f"{k} (was {a}, now {b})"
                for k, a in {**state["about"], **state["about"]["spec"]}.items()
                if a != (b := {**mine, **mine["spec"]}.get(k)) and k not in ("spec", "classes")
            ]
            raise FastjacError(f"{path} is of another model: {'; '.join(parts) or 'other classes'}")
        if different := changed(state["options"], asdict(self.options)):
            raise FastjacError(f"{path} is of a run with other options: {', '.join(different)}")
        load_weights(self.model, state["model"], path, ignore_head=False)
        self.heads.load_state_dict(state.get("heads", {}))
        self.optimizer.load_state_dict(state["optimizer"])
        if self.options.cuda_graphs:  # a tensor, which the file gives on the CPU
            for group in self.optimizer.param_groups:
                group["lr"] = group["lr"].to(self.device)
        self.scheduler.load_state_dict(state["scheduler"])
        self.scaler.load_state_dict(state["scaler"])
        self.epoch, self.best, self.history = state["epoch"], state["best"], state["history"]
        torch.set_rng_state(state["rng"]["torch"])
        # Version 0.1 kept CUDA's alone.
        devices = state["rng"].get("devices", {"cuda": state["rng"].get("cuda")})
        if states := devices.get(self.device.type):
            torch.get_device_module(self.device).set_rng_state_all(states)
        self.order.set_state(state["rng"]["order"])
