"""The trainer's throughput, what each of its options costs, and how long a checkpoint holds it up.

    python -m benchmarks.trainer --model vgg4 --size 64 --rounds 5
    torchrun --nproc-per-node 2 -m benchmarks.trainer --threads 1 --variants plain

The data set is a folder of JPEG photographs of noise, written for the purpose, with ``--augment``: so
the loader has files to decode, crop and flip. Each variant is ``python -m fastjac.train teacher`` with
the options of its name, in this process; ``plain`` has none of them. A round is an epoch of ``--steps``
steps of each variant in turn, with an evaluation and a checkpoint at its end that do not count as steps.
Under ``torchrun`` the processes share each batch, and the first one's figures are of all their images.

One line of JSON for each variant:

- ``images_per_second``: of the steps, median of the rounds, with 20 % and 80 % quantiles;
- ``ratio``: the time that an image takes over that in ``plain``, median round by round;
- ``loader_share``: of the steps' time, how much they waited for images;
- ``checkpoint_s``: the longest that a checkpoint took, all its files included.

Before anything is timed, the images of the first step are compared: the variants with worker processes
must have those of ``plain``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import measuring

MODULE = "benchmarks.trainer"
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "workers-1": {"workers": 1},
    "grad-accum": {"grad_accum": 2},
    "micro-batch": {"micro_batch": 8},
    "micro-batch-auto": {"micro_batch": "auto"},
    "clip-grad": {"clip_grad": 1.0},
    "model-ema": {"model_ema": True},
    "warmup": {"warmup_epochs": 1, "sched": "cosine"},
    "label-smoothing": {"label_smoothing": 0.1},
    "mixup": {"mixup": 0.8},
    "cutmix": {"cutmix": 1.0},
    "amp": {"amp": True},
    "channels-last": {"channels_last": True},
}


def write_images(folder: Path, size: int, count: int) -> None:
    """``count`` training images of two classes, and a few test images."""
    from PIL import Image

    for part, number in (("train", count), ("val", 8)):
        for kind in ("a", "b"):
            (folder / part / kind).mkdir(parents=True)
            for i in range(number // 2):
                image = Image.effect_noise((size * 8 // 7, size * 8 // 7), 60).convert("RGB")
                image.save(folder / part / kind / f"{i}.jpg")


class Variant:
    """A run with some options, whose steps, waits for images and checkpoints are timed."""

    def __init__(self, name: str, args: argparse.Namespace, folder: Path) -> None:
        from fastjac.train.commands import prepare
        from fastjac.train.options import TeacherOptions

        more = VARIANTS[name]
        self.images = args.steps * args.batch * more.get("grad_accum", 1)
        options = TeacherOptions(
            dataset="folder",
            data_dir=str(folder / "images"),
            img_size=args.size,
            augment=True,
            model=args.model,
            batch_size=args.batch,
            epoch_steps=args.steps,
            epochs=args.rounds + 1,
            device=args.device,
            threads=args.threads,
            output=str(folder / "runs"),
            experiment=name,
            **more,
        )
        self.training = prepare(options)
        self.training.folder.open({})
        self.training.step.parallelise(self.training.try_once())
        self.seconds: list[float] = []
        self.waited: list[float] = []
        self.checkpoints: list[float] = []
        self._epoch, self._save = self.training.batches.epoch, self.training._save
        self.training.batches.epoch, self.training._save = self.timed_epoch, self.timed_save

    def timed_epoch(self, first: int = 0) -> Iterator[Any]:
        """The batches of an epoch; the time until the last step ends is noted, and the waits in it."""
        start, waited = time.perf_counter(), 0.0
        batches = self._epoch(first)
        while True:
            asked = time.perf_counter()
            step = next(batches, None)
            waited += time.perf_counter() - asked
            if step is None:
                break
            yield step
        self.wait()
        self.seconds.append(time.perf_counter() - start)
        self.waited.append(waited)

    def timed_save(self, best: bool = False) -> None:
        start = time.perf_counter()
        self._save(best)
        self.checkpoints.append(time.perf_counter() - start)

    def wait(self) -> None:
        import torch

        if self.training.device.type == "cuda":
            torch.cuda.synchronize()

    def round(self) -> float:
        """An epoch; its loss."""
        with self.training._bar(False) as bar:
            return self.training._epoch(bar)["train_loss"]

    def first_images(self) -> Any:
        """The images of the first step; the epoch's order is drawn again."""
        batches = self.training.batches
        state = batches.order.get_state()
        ((x, _), *_) = next(self._epoch())
        batches.order.set_state(state)
        return x

    def figures(self, plain: Variant) -> dict[str, Any]:
        """What the module says, less the first round, which warms up."""
        seconds, waited = self.seconds[1:], self.waited[1:]
        rates = [self.images / t for t in seconds]
        low, _, _, high = statistics.quantiles(rates, n=5) if len(rates) > 1 else rates * 4
        ratios = [
            (own / self.images) / (other / plain.images)
            for own, other in zip(seconds, plain.seconds[1:], strict=True)
        ]
        return {
            "images_per_second": statistics.median(rates),
            "quantiles": [low, high],
            "ratio": statistics.median(ratios),
            "loader_share": sum(waited) / sum(seconds),
            "checkpoint_s": max(self.checkpoints),
        }


def measure(args: argparse.Namespace, folder: Path) -> dict[str, dict[str, Any]]:
    """The figures of each variant."""
    import math

    import torch

    from fastjac.train import ranks

    folder = Path(ranks.gather(str(folder))[0])
    if ranks.is_first():
        write_images(folder / "images", args.size, args.images)
    ranks.gather(None)  # all wait for the images
    variants = {name: Variant(name, args, folder) for name in args.variants}
    plain = variants["plain"]
    for name, variant in variants.items():
        if "workers" in VARIANTS[name]:
            same = torch.equal(variant.first_images(), plain.first_images())
            if not same:
                raise SystemExit(f"{name}: its images are not those of plain; nothing was timed")
    for _ in range(args.rounds + 1):
        for name, variant in variants.items():
            if not math.isfinite(loss := variant.round()):
                raise SystemExit(f"{name}: the loss is {loss}")
    return {name: variant.figures(plain) for name, variant in variants.items()}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=f"python -m {MODULE}",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", default="vgg4", help="as the trainer's")
    parser.add_argument("--size", type=int, default=64, help="height and width of the images")
    parser.add_argument("--images", type=int, default=256, help="files to train on")
    parser.add_argument("--batch", type=int, default=16, help="images of a batch")
    parser.add_argument("--steps", type=int, default=10, help="steps of a round")
    parser.add_argument("--rounds", type=int, default=5, help="after one to warm up")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, help="CPU threads; default: as torch has it")
    parser.add_argument("--json", type=Path, help="write every figure to this file, too")
    args = parser.parse_args(argv)
    args.variants = ["plain", *(name for name in args.variants if name != "plain")]
    return args


def main() -> None:
    from fastjac.train import ranks
    from fastjac.train.build import pick_device

    args = parse()
    with tempfile.TemporaryDirectory() as folder, ranks.together(pick_device(args.device)):
        found = measure(args, Path(folder))
        rows = [{"variant": name, **figures} for name, figures in found.items()]
    if not ranks.is_first():
        return
    for row in rows:
        print(json.dumps(row), flush=True)
    measuring.write_json(args, MODULE, rows)


if __name__ == "__main__":
    main()
