"""The commands, one function each, from options to a line that says what came of it."""

from __future__ import annotations

from dataclasses import replace
from itertools import zip_longest
from typing import Any

import torch

from fastjac.data import ImageData
from fastjac.errors import FastjacError, notice
from fastjac.models import check_image_size
from fastjac.train import ranks
from fastjac.train.build import build_data, build_model, load_trained, pick_device
from fastjac.train.loop import Training, evaluate
from fastjac.train.memory import keep_pages
from fastjac.train.objective import Classification, Objective, distillation
from fastjac.train.options import TAUGHT, EvaluateOptions, RunOptions, StudentOptions, flag


def prepare(options: RunOptions, data: ImageData | None = None) -> Training:
    """The run of ``options``, ready to go; nothing is written yet. Sets torch's global seed.

    ``data``: the options' own, where they are there already.
    """
    kind = "student" if isinstance(options, StudentOptions) else "teacher"
    if options.experiment is None:
        name = f"{kind}-{options.dataset}-{options.model.replace('/', '-')}"
        options = replace(options, experiment=name)
    if pick_device(options.device).type == "cpu":
        keep_pages()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    if data is None:
        data = build_data(options, getattr(options, "unlabelled", None))
    torch.manual_seed(options.seed)
    model, spec = build_model(options, data)
    objective: Objective = Classification(model)
    if isinstance(options, StudentOptions):
        objective = distillation(options, model, data)
    torch.manual_seed(options.seed + ranks.rank())
    return Training(options, data, model, spec, objective)


def train(options: RunOptions) -> str:
    """``teacher`` and ``student``."""
    if getattr(options, "teacher", None) and not any(getattr(options, term) for term in TAUGHT):
        terms = ", ".join(map(flag, TAUGHT))
        notice(f"--teacher is not used: the weights of its terms are all 0 ({terms})")
    with ranks.together(pick_device(options.device)):
        training = prepare(options)
        result = training.run()
    return (
        f"{100 * result['test_accuracy']:.2f} % of {len(training.data.test)} test images right "
        f"after {result['epoch']} epochs; results in {training.folder.path}"
    )


def score(options: EvaluateOptions) -> str:
    """``evaluate``."""
    device = pick_device(options.device)
    trained = load_trained(options.checkpoint)
    settings: dict[str, Any] = {
        "dataset": options.dataset or trained.dataset,
        "data_dir": options.data_dir,
        "download": options.download,
        "skip_damaged": options.skip_damaged,
        "img_size": trained.size,
        "channels": 3 if trained.spec.in_channels == 3 else None,  # greyscale may be repeated
    }
    data = build_data(RunOptions(**settings))
    pairs = zip_longest(map(str, trained.classes), data.classes)
    if other := next((pair for pair in pairs if pair[0] != pair[1]), None):
        raise FastjacError(
            f"{trained.source} knows {len(trained.classes)} classes, {data.name} has "
            f"{len(data.classes)}; the first to differ is {other[0]!r} and {other[1]!r}"
        )
    check_image_size(trained.model, data.channels, data.size)
    with ranks.together(device):
        ranks.agree({"images": len(data.test), "classes": list(data.classes)})
        result = evaluate(
            trained.model.to(device),
            data.test,
            len(data.classes),
            options.batch_size,
            options.workers,
        )
    return (
        f"{100 * result['accuracy']:.2f} % of {len(data.test)} test images right, "
        f"loss {result['loss']:.4f}; {trained.source}"
    )
