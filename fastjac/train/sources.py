"""The files that options name. They are looked for before PyTorch is imported, which takes seconds."""

from __future__ import annotations

import os
from pathlib import Path

from fastjac.errors import FastjacError, existing_file, is_dir, is_file
from fastjac.train.options import LIBRARIES, EvaluateOptions, RunOptions, StudentOptions


def is_library_name(model: str) -> bool:
    """Whether ``model`` names a network of torchvision or timm."""
    return model.startswith(LIBRARIES)


def find_trained(source: str | Path) -> Path:
    """The file with the network of a run's folder, or ``source`` itself where that is a file.

    Of a run that is not finished, its last checkpoint: it may have been finished before.
    """
    path = Path(source)
    if is_dir(path):
        export, last = path / "model.safetensors", path / "last.pt"
        finished = is_file(path / "config.json") and is_file(export)
        path = last if is_file(last) and not finished else export
    return existing_file(path, "a checkpoint or model.safetensors")


def check_sources(options: RunOptions | EvaluateOptions) -> None:
    """Raises for a file or folder that the options name and that is not there."""
    if options.data_dir is not None and not (options.download or is_dir(options.data_dir)):
        raise FastjacError(f"--data-dir {options.data_dir}: no such folder")
    unlabelled = getattr(options, "unlabelled", None)
    if unlabelled is not None and not is_dir(unlabelled):
        raise FastjacError(f"--unlabelled {unlabelled}: no such folder")
    if isinstance(options, EvaluateOptions):
        find_trained(options.checkpoint)
        return
    if options.weights is not None:
        existing_file(options.weights)
    for name, folder in (("output", options.output), ("experiment", options.experiment or "")):
        if (longest := max(len(os.fsencode(part)) for part in ("", *Path(folder).parts))) > 255:
            raise FastjacError(
                f"--{name}: expected names of at most 255 bytes, got one of {longest}"
            )
    if isinstance(options, StudentOptions) and options.teacher is not None:
        if not is_library_name(options.teacher):
            find_trained(options.teacher)
        elif options.teacher_weights is not None:
            existing_file(options.teacher_weights)
