"""``python -m fastjac.coverage``: how far the images of one set lie from those of others.

Which target images to transfer on, by Proposition 3: the smaller the directed Hausdorff distance of the
source's images from them, the tighter the bound. Exit status: 0; 1 if the system failed (a file,
memory), 2 for bad input and 130 if interrupted, each with one line on the standard error. PyTorch is
imported once the command line is known to be right.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from fastjac.errors import FastjacError, existing_file, unknown
from fastjac.train.__main__ import report
from fastjac.train.sources import find_trained, is_library_name

if TYPE_CHECKING:
    from torch import Tensor, nn

METRICS = ("euclidean", "manhattan", "angular")  # as in fastjac.theory, which imports PyTorch
DESCRIPTION = """Directed Hausdorff distances H(SOURCE, CANDIDATE) between sets of images, in a network's
features: the largest distance of a source image to the nearest image of the candidate. Candidates are
ranked, the nearest first. With --pick K: which K source images to add to the candidates (together, if
several; or to nothing) to bring H down, farthest first; their paths go to the standard output, one per
line."""
EXAMPLE = """example:
  python -m fastjac.coverage imagenet/train mit67/Images my_photos --network torchvision/resnet18
  python -m fastjac.coverage imagenet/train mit67/Images --network runs/teacher --pick 100 > add.txt"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise FastjacError(message)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The options, whose files and folders are there."""
    parser = _Parser(
        prog="python -m fastjac.coverage",
        usage="%(prog)s SOURCE [CANDIDATE ...] --network NETWORK [OPTIONS]",
        description=DESCRIPTION,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("source", type=Path, help="folder of images, at any depth: the large set")
    add("candidates", type=Path, nargs="*", metavar="CANDIDATE", help="folders: the small sets")
    add("--network", help="a run's folder, checkpoint or weights; torchvision/NAME; timm/NAME")
    add("--weights", help="file for a named network; default: the library's pretrained weights")
    add("--layer", help="layer that gives the features (maps: averaged); default: the last's input")
    add("--metric", default="euclidean", help="euclidean, manhattan or angular; default: euclidean")
    add("--pick", type=int, metavar="K", help="pick K images of the source, farthest first")
    add("--csv", type=Path, metavar="FILE", help="write the table, or the picks in order, as CSV")
    add("--img-size", type=int, help="height and width; default: the network's, or 224")
    add("--batch-size", type=int, default=64, help="images of a forward (default: %(default)s)")
    add("--workers", type=int, default=0, help="processes that load images (default: %(default)s)")
    add(
        "--skip-damaged",
        action="store_true",
        help="read every image first; leave out and count damaged ones",
    )
    add("--device", help="cpu, cuda, cuda:1, ...; default: cuda where there is one")
    known = [option for action in parser._actions for option in action.option_strings]
    for word in argv:
        if word.startswith("--") and (name := word.partition("=")[0]) not in known:
            raise unknown("option", name, known)
    options = parser.parse_intermixed_args(list(argv))
    if options.network is None:
        raise FastjacError(
            "--network is missing; expected a run's folder or torchvision/resnet18, say"
        )
    if options.metric not in METRICS:
        raise unknown("metric", options.metric, METRICS)
    for name, least in (("pick", 1), ("img_size", 1), ("batch_size", 1), ("workers", 0)):
        value = getattr(options, name)
        if value is not None and value < least:
            flag = name.replace("_", "-")
            raise FastjacError(f"--{flag}: expected {least} or more, got {value}")
    if not options.candidates and options.pick is None:
        raise FastjacError("no CANDIDATE to rank; expected folders, or --pick K")
    for folder in (options.source, *options.candidates):
        if not folder.is_dir():
            raise FastjacError(f"{folder}: no such folder; expected a folder of images")
    folders = [folder.resolve() for folder in (options.source, *options.candidates)]
    if twice := [folder for folder in folders if folders.count(folder) > 1]:
        raise FastjacError(f"{twice[0]} is named twice; expected different folders")
    if options.csv is not None and not options.csv.parent.is_dir():
        raise FastjacError(f"--csv {options.csv}: no folder {options.csv.parent} to write it to")
    if options.csv is not None and options.csv.is_dir():
        raise FastjacError(f"--csv {options.csv} is a folder; expected a file to write")
    if not is_library_name(options.network):
        find_trained(options.network)
        if options.weights is not None:
            raise FastjacError("--weights goes with torchvision/NAME or timm/NAME alone")
    elif options.weights is not None:
        existing_file(options.weights)
    return options


def cover(options: argparse.Namespace) -> str:
    """What goes to the standard output: the table, or the picks."""
    import torch

    from fastjac.progress import progress_bar
    from fastjac.theory import farthest_first
    from fastjac.train.build import pick_device

    device = pick_device(options.device)
    model, size, channels = _network(options)
    files = {
        folder: image_files(folder, options.skip_damaged)
        for folder in (options.source, *options.candidates)
    }
    paths = files[options.source]
    if options.pick is not None and options.pick > len(paths):
        raise FastjacError(
            f"--pick {options.pick}: {options.source} has {len(paths)} images; expected at most that"
        )
    model = model.to(device).eval()
    total = sum(map(len, files.values()))
    with progress_bar(total=total, desc="features", unit="image") as bar:
        features = {
            folder: _features(model, found, size, channels, options, device, bar.update)
            for folder, found in files.items()
        }
    source = features.pop(options.source)
    if options.pick is None:
        rows = _ranked(source, features, files, options)
        text = as_text(rows)
    else:
        small = torch.cat(list(features.values())) if features else None
        found = farthest_first(
            *(source, small, options.pick, options.metric),
            progress=lambda r: progress_bar(r, desc="picks", unit="pick"),
        )
        picks, distances = found.picks.tolist(), found.distances.tolist()
        rows = [
            {"order": n + 1, "path": str(paths[p]), "hausdorff": distances[n + 1]}
            for n, p in enumerate(picks)
        ]
        text = "\n".join(str(paths[p]) for p in picks)
        print(f"H from {distances[0]:.6g} to {distances[-1]:.6g}", file=sys.stderr)
    if options.csv is not None:
        from fastjac.train.files import CannotWrite, write_csv

        try:
            write_csv(options.csv, rows)
        except CannotWrite:
            print(text)  # which took long
            raise
    return text


def _ranked(
    source: Tensor, features: dict[Path, Tensor], files: dict[Path, list[Path]], options: Any
) -> list[dict[str, Any]]:
    from fastjac.progress import progress_bar
    from fastjac.theory import nearest_distances

    rows = []
    bar = progress_bar(features.items(), desc="distances", unit="set")
    for folder, small in bar:
        distances, nearest = nearest_distances(source, small, options.metric)
        point = int(distances.argmax())
        rows.append(
            {
                "candidate": str(folder),
                "images": len(small),
                "hausdorff": distances[point].item(),
                "mean": distances.mean().item(),
                "farthest": str(files[options.source][point]),
                "nearest": str(files[folder][int(nearest[point])]),
            }
        )
    return sorted(rows, key=lambda row: row["hausdorff"])


def as_text(rows: Sequence[dict[str, Any]]) -> str:
    """H, the mean distance, the number of images, the candidate and the farthest image, by H."""
    lines = ["         H      mean    images  candidate (farthest image of the source)"]
    for row in rows:
        numbers = f"{row['hausdorff']:>10.5g}{row['mean']:>10.5g}{row['images']:>10}"
        lines.append(f"{numbers}  {row['candidate']} ({row['farthest']})")
    return "\n".join(lines)


def image_files(folder: Path, skip_damaged: bool = False) -> list[Path]:
    """The images in ``folder`` and below, sorted; hidden files and folders are skipped and counted."""
    from fastjac.data.image_files import list_images, no_image, without_damaged

    found = list_images(folder)
    found.tell(folder)
    paths = found.images
    if skip_damaged:
        paths = [path for path, _ in without_damaged([(path, 0) for path in paths])]
    if not paths:
        raise no_image(folder)
    return paths


def _network(options: argparse.Namespace) -> tuple[nn.Module, int, int]:
    """The network, and the size and channels of its images."""
    from fastjac.features import find_layer
    from fastjac.models import (
        ModelSpec,
        check_image_size,
        create_model,
        load_weights,
        read_weights,
    )
    from fastjac.train.build import load_trained

    if is_library_name(options.network):
        model = create_model(ModelSpec(options.network), pretrained=options.weights is None)
        if options.weights is not None:
            load_weights(model, read_weights(options.weights), options.weights)
        size, channels = options.img_size or 224, 3
    else:
        trained = load_trained(options.network)
        model, channels = trained.model, trained.spec.in_channels
        size = options.img_size or trained.size
        if channels not in (1, 3):
            raise FastjacError(f"{options.network} takes {channels} channels; expected 1 or 3")
    check_image_size(model, channels, size)
    if options.layer is not None:
        find_layer(model, options.layer, options.network)
    return model, size, channels


def _features(
    model: nn.Module,
    paths: Sequence[Path],
    size: int,
    channels: int,
    options: argparse.Namespace,
    device: Any,
    advance: Any,
) -> Tensor:
    """One row per image: maps are averaged over their positions. Float32 on the device."""
    import torch
    from torch.utils.data import DataLoader

    from fastjac.data.image_files import SKIP_DAMAGED, Images, middle_crop
    from fastjac.features import capture
    from fastjac.models.create import find_head

    grey = torch.tensor([0.299, 0.587, 0.114], device=device).view(3, 1, 1)  # ITU-R BT.601
    inputs: list[Any] = []
    hook = find_head(model)[1].register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    images = Images([(path, 0) for path in paths], middle_crop(size), SKIP_DAMAGED)
    rows: list[Tensor] = []
    try:
        for x, _ in DataLoader(images, options.batch_size, num_workers=options.workers):
            inputs.clear()
            x = x.to(device)
            with torch.no_grad(), capture(model, [options.layer]) as layers:
                model((x * grey).sum(1, keepdim=True) if channels == 1 else x)
            value = layers.get(options.layer, inputs[-1] if inputs else None)
            rows.append(_row_per_image(value, len(x), options.layer or "the last layer's input"))
            if not (finite := rows[-1].isfinite().all(1)).all():
                bad = sum(map(len, rows[:-1])) + int(finite.logical_not().nonzero()[0])
                raise FastjacError(f"{paths[bad]}: its features have a NaN or an infinity")
            advance(len(x))
    finally:
        hook.remove()
    return torch.cat(rows)


def _row_per_image(value: Tensor | None, images: int, layer: str) -> Tensor:
    if value is None or value.dim() not in (2, 4) or len(value) != images:
        came = "nothing" if value is None else list(value.shape)
        raise FastjacError(
            f"{layer}: expected features [{images}, C] or [{images}, C, h, w], got {came}; --layer "
            "names another layer"
        )
    return (value.mean((2, 3)) if value.dim() == 4 else value).float()


def main(argv: Sequence[str] | None = None) -> int:
    """Run; report on the standard output, or say in one line what was wrong; the exit status."""
    return report(lambda: cover(parse(sys.argv[1:] if argv is None else argv)))


if __name__ == "__main__":
    sys.exit(main())
