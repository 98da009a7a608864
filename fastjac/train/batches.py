"""The training batches of an epoch, from any step on."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from fastjac.data import epoch_batches
from fastjac.errors import FastjacError
from fastjac.train import interrupts, ranks
from fastjac.train.options import RunOptions
from fastjac.train.randomness import seeding

Batch = tuple[Tensor, Tensor]


LOST_LOADER = "a process that loads images has ended; fewer --workers take less memory"


def lost_loader(error: BaseException) -> bool:
    """Whether ``error`` says that one of ``--workers`` was killed, or is out of shared memory."""
    gone = isinstance(error, ConnectionError | EOFError)  # while a batch came from it
    return gone or "DataLoader worker (pid" in str(error) or "shared memory" in str(error)


class SeededImages(Dataset):
    """Images whose augmentation is seeded one by one, by the epoch and their place in it.

    So they depend on no worker process, on no batch before theirs, and on nothing that a network draws.
    An item's key is its place in the epoch and its index in ``images``.
    """

    def __init__(self, images: Dataset, seed: int) -> None:
        self.images, self.seed = images, seed

    def __getitems__(self, keys: Sequence[tuple[int, int]]) -> list[Any]:
        with seeding() as seed:
            items = []
            for place, index in keys:
                seed(self.seed + place)
                items.append(self.images[index])
        return items


def draws_nothing(images: Dataset) -> bool:
    """Whether an item is read from memory, without random numbers."""
    if isinstance(images, Subset):
        return draws_nothing(images.dataset)
    return isinstance(images, TensorDataset)


class Batches:
    """What every step of an epoch is computed from: ``--grad-accum`` batches of ``--batch-size``.

    Of several processes each has its share of every batch.

    ``order`` is the generator that all depends on. Its state at the start of an epoch, ``start``, and
    a number of steps are enough to go on in the middle of it.
    """

    def __init__(self, options: RunOptions, images: Dataset, classes: int, pin: bool) -> None:
        self.options, self.images, self.classes, self.pin = options, images, classes, pin
        self.mixup = None
        if options.mixup or options.cutmix:
            from timm.data import Mixup  # seconds to import

            self.mixup = Mixup(
                options.mixup,
                options.cutmix,
                label_smoothing=options.label_smoothing,
                num_classes=classes,
            )
        self.order = torch.Generator().manual_seed(options.seed)
        drawn = self._draw(torch.Generator())
        sizes = [len(ranks.share_of(batch)) for step in drawn for batch in step]
        self.steps, self.smallest = math.ceil(len(sizes) / options.grad_accum), min(sizes)
        if self.mixup and any(size % 2 for size in sizes):
            raise FastjacError(
                f"--mixup and --cutmix mix the images of a batch in pairs; expected an even number of "
                f"them, got {next(size for size in sizes if size % 2)}"
            )

    def _draw(self, order: torch.Generator) -> list[list[list[int]]]:
        """The batches of every step of an epoch, as indices of images."""
        options = self.options
        size = options.batch_size
        steps = epoch_batches(
            len(self.images), size * options.grad_accum, options.epoch_steps, order
        )
        return [
            [batch.tolist() for batch in torch.tensor(step).tensor_split(-(-len(step) // size))]
            for step in steps
        ]

    def epoch(self, first: int = 0) -> Iterator[list[Batch]]:
        """Draw the next epoch; the batches of its steps, on the host, from step ``first`` on."""
        self.start = self.order.get_state()
        steps = self._draw(self.order)
        self.seed = int(torch.empty((), dtype=torch.int64).random_(generator=self.order))
        batches = [batch for step in steps for batch in step]
        images, keys = self.images, batches
        if not draws_nothing(images):
            places = iter(range(sum(map(len, batches))))
            images = SeededImages(images, self.seed)
            keys = [[(next(places), index) for index in batch] for batch in batches]
        counts = [len(step) for step in steps]
        loader = DataLoader(
            images,
            batch_sampler=[ranks.share_of(batch) for batch in keys[sum(counts[:first]) :]],
            num_workers=self.options.workers,
            pin_memory=self.pin,
            generator=torch.Generator(),  # else it draws from the network's
        )
        read = self._checked(interrupts.read(loader))
        return (list(islice(read, count)) for count in counts[first:])

    def _checked(self, read: Iterable[Batch]) -> Iterator[Batch]:
        options = self.options
        soft = options.mixup or options.cutmix or options.label_smoothing
        for x, y in read:
            if soft and (y < 0).any():
                raise FastjacError(
                    "--mixup, --cutmix and --label-smoothing need a label for every image; got "
                    "unlabelled ones"
                )
            yield x, y

    def soften(self, x: Tensor, y: Tensor, number: int) -> Batch:
        """``x`` and ``y`` as the options mix and smooth them; ``x`` may be written to.

        ``number`` is the batch's in its epoch, which with the epoch's seed decides all.
        """
        if self.mixup is not None:
            with seeding() as seed:
                seed(self.seed - 1 - number)
                return self.mixup(x, y)
        if smoothing := self.options.label_smoothing:
            y = torch.nn.functional.one_hot(y, self.classes) * (1 - smoothing)
            return x, y + smoothing / self.classes
        return x, y
