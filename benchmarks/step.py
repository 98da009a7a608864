"""One training step: plain distillation, with Jacobian matching by double backward, and by fastjac.

    python -m benchmarks.step vgg9-224 resnet18-224 --batch 8

A step is student and teacher forward, the loss and its backward; no optimiser. The loss is
cross-entropy, squared error of the logits and, for a window, attention matching; ``naive`` and
``fastjac`` add the Jacobian term. ``naive`` is the usual code: one forward with batch statistics,
``autograd.grad(create_graph=True)``, backward; it runs with ``batch_stats="batch"`` in every
configuration, since frozen statistics would cost it a second forward. ``--contenders plain fused``
compares the plain step with itself on networks that ``fastjac.fuse`` has rewritten; in a configuration
without a layer, since a layer's features end a chain. ``compiled`` is the plain step with both networks
under ``torch.compile``; on a CPU its memory has the compiler's in it. On a GPU, ``plain-graphed``,
``fastjac-graphed`` and so on are those steps under ``fastjac.graphed``.

Time: all contenders in turn in one process, each in its better memory layout; median with 20 % and
80 % quantiles, and the ratio to plain round by round. On a CPU it is taken under two allocator
settings, the default and one that keeps its pages, and a profile says how much of it convolutions take,
PyTorch's and fastjac's own. Of fastjac's step, also the time in the Jacobian's sweeps.
Host: the same with one image of the smallest size and networks of a few channels (``--width``), so that
arithmetic is negligible: what the host does for a step, and a GPU may wait for.
Memory: peak resident memory of three steps over that before the first, each contender in processes of
its own, the median of five; under the default allocator, whose heap keeps what it cannot return, more
in one process and less in another. On a CPU also under one that maps every tensor of a MiB by itself:
what the steps need. On a GPU, what PyTorch's allocator says, which does not vary: one process.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks import measuring

MODULE = "benchmarks.step"
CONTENDERS = ("plain", "naive", "fastjac")
HOST_STEPS = 200


@dataclass(frozen=True)
class Configuration:
    """Networks, image size and target of a step."""

    student: str
    teacher: str
    size: int
    batch: int
    layer: str | None = None
    window: float = 1 / 5
    batch_stats: str = "frozen"
    classes: int = 100
    width: float = 1.0  # of a VGG


CONFIGURATIONS = {
    "vgg9-224": Configuration("vgg9", "vgg9", 224, 8, "pool2"),
    "vgg9-448": Configuration("vgg9", "vgg9", 448, 8, "pool2", window=1 / 10),
    "vgg9-224-batch": Configuration("vgg9", "vgg9", 224, 8, "pool2", batch_stats="batch"),
    "vgg9-224-logits": Configuration("vgg9", "vgg9", 224, 8),
    "resnet18-224": Configuration("resnet18", "resnet34", 224, 8, "layer1"),
    "vgg4-32": Configuration("vgg4", "vgg9", 32, 128, batch_stats="batch"),
}


def network(name: str, config: Configuration) -> Any:
    """A VGG of fastjac's, or a network of torchvision's."""
    import torchvision

    import fastjac.models.vgg as vgg

    if hasattr(vgg, name):
        return getattr(vgg, name)(config.classes, width=config.width)
    return torchvision.models.get_model(name, num_classes=config.classes)


def compiled(net: Any, layer: str | None) -> Any:
    """``forward_with_features(net, x, layer)`` of x, as one graph: so its hook must stay."""
    import torch

    from fastjac.features import find_layer

    caught: list[torch.Tensor] = []
    if layer:
        find_layer(net, layer).register_forward_hook(lambda module, args, out: caught.append(out))

    def forward(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        return net(x), caught.pop() if layer else None

    return torch.compile(forward, fullgraph=True)


class Contender:
    """One way of taking the step, on its own copies of the networks."""

    def __init__(
        self, name: str, config: Configuration, layout: str, device: str, amp: bool
    ) -> None:
        import torch

        import fastjac
        from fastjac.features import forward_with_features

        name, graphed = name.removesuffix("-graphed"), name.endswith("-graphed")
        torch.manual_seed(0)
        nets = [network(n, config) for n in (config.student, config.teacher)]
        form = measuring.memory_format(layout)
        student, teacher = (net.to(device, memory_format=form) for net in nets)
        torch.manual_seed(1)
        x = torch.rand(config.batch, 3, config.size, config.size)
        self.x = x.to(device, memory_format=form)
        self.y = torch.randint(config.classes, (config.batch,)).to(device)
        self.student, self.teacher, self.layer = student.train(), teacher.eval(), config.layer
        self.device, self.amp = device, amp
        self.jacobians = name not in ("plain", "fused", "compiled")
        if name == "fused":
            self.student, self.teacher = fastjac.fuse(self.student), fastjac.fuse(self.teacher)
        self.forwards = [
            compiled(net, self.layer)
            if name == "compiled"
            else functools.partial(forward_with_features, net, layer=self.layer)
            for net in (self.student, self.teacher)
        ]
        target = fastjac.LabelLogit()
        if config.layer:
            target = fastjac.AttentionWindow(config.layer, window=config.window)
        naive = {"batch_stats": "batch", "strategy": "autograd"}
        ours = {"batch_stats": config.batch_stats, "strategy": "auto"}
        reference = {"batch_stats": config.batch_stats, "strategy": "autograd"}
        if self.jacobians:
            ways = {"naive": naive, "fastjac": ours, "reference": reference}
            self.matcher = fastjac.JacobianMatching(student, teacher, target, **ways[name])
        self.taken = fastjac.graphed(self.take, warmup=2) if graphed else self.take

    def step(self) -> float:
        """Take the step; the loss."""
        return float(self.taken(self.x, self.y))  # waits for the device

    def take(self, x: Any, y: Any) -> Any:
        """The step on a batch; the loss, for which nothing waits."""
        import torch
        import torch.nn.functional as F

        import fastjac

        self.student.zero_grad(set_to_none=True)
        with torch.autocast(self.device, torch.bfloat16, enabled=self.amp):
            if self.jacobians:
                out = self.matcher(x, y)
                logits, logits_t = out.student_logits, out.teacher_logits
                features, features_t = out.student_features, out.teacher_features
                loss = out.jacobian_loss
            else:
                student, teacher = self.forwards
                with torch.no_grad():
                    logits_t, features_t = teacher(x)
                logits, features = student(x)
                loss = 0.0
            loss = loss + F.cross_entropy(logits, y)
            loss = loss + fastjac.activation_match_loss(logits, logits_t)
            if features is not None:
                loss = loss + fastjac.attention_match_loss(features, features_t)
        loss.backward()
        return loss.detach()


def validate(config: Configuration, device: str) -> float:
    """The relative error of fastjac's parameter gradient against the reference's, float64, batch 2."""
    small = dataclasses.replace(config, batch=2, size=min(config.size, 112))
    students = []
    for name in ("fastjac", "reference"):
        contender = Contender(name, small, "channels_last", device, amp=False)
        contender.student.double()
        contender.teacher.double()
        contender.x = contender.x.double()
        contender.step()
        students.append(contender.student)
    return measuring.relative_error(*students)


def time_steps(args: argparse.Namespace, config: Configuration, rounds: int) -> dict[str, Any]:
    """Seconds per step of every contender in every layout, round by round."""
    contenders = {
        (name, layout): Contender(name, config, layout, args.device, args.amp)
        for name in args.contenders
        for layout in args.layouts
    }
    seconds = measuring.time_in_turn(contenders, rounds)
    rows = measuring.compare(seconds, args.contenders, args.layouts)
    for name, row in rows.items():
        contender = contenders[name, row["layout"]]
        if args.device == "cpu" and args.worker == "time":
            row["convolutions"] = row["ratio"] * measuring.convolution_share(contender)
        if name == "fastjac":
            row["sweeps_s"] = measuring.sweep_seconds(contender, args.device)
    return rows


def peak_memory(args: argparse.Namespace, config: Configuration) -> int:
    """Bytes that steps of the one contender need."""
    how = (args.layouts[0], args.device, args.amp)
    small = dataclasses.replace(config, size=32, batch=2)
    return measuring.peak_memory(
        Contender(args.contenders[0], config, *how),
        args.device,
        warm=lambda: Contender(args.contenders[0], small, *how).step(),
    )


def worker(args: argparse.Namespace) -> dict[str, Any]:
    """What the process that measures prints."""
    config = Configuration(**json.loads(args.worker_config))
    if args.worker in ("time", "host"):
        rounds = args.rounds if args.worker == "time" else HOST_STEPS
        return {"rows": time_steps(args, config, rounds)}
    if args.worker == "validate":
        return {"error": validate(config, args.device)}
    return {"bytes": peak_memory(args, config)}


def spawn(
    task: str,
    config: Configuration,
    args: argparse.Namespace,
    contenders: list[str],
    layouts: list[str],
    env: Mapping[str, str],
) -> dict[str, Any]:
    """Measure in a process of its own."""
    words = ["--worker", task, "--worker-config", json.dumps(asdict(config))]
    words += ["--device", args.device, "--rounds", str(args.rounds), *(["--amp"] * args.amp)]
    words += ["--contenders", *contenders, "--layouts", *layouts]
    return measuring.spawn(MODULE, words, env)


def host_configuration(config: Configuration, args: argparse.Namespace) -> Configuration:
    """The configuration with next to no arithmetic, of the same operations."""
    return dataclasses.replace(config, size=64, batch=1, width=args.width)


def measure(name: str, config: Configuration, args: argparse.Namespace) -> dict[str, Any]:
    """Every figure of one configuration."""
    result: dict[str, Any] = {"configuration": name, **asdict(config), "time": {}, "memory": {}}
    error = spawn("validate", config, args, args.contenders, args.layouts, {})["error"]
    result["gradient_error_float64"] = error
    if error > 1e-9:
        raise SystemExit(f"{name}: fastjac's gradient is off by {error:.1e}; nothing was timed")
    settings = measuring.ALLOCATORS if args.device == "cpu" else {"device": {}}
    if "host" in args.measure:
        tiny = host_configuration(config, args)
        rows = spawn("host", tiny, args, args.contenders, args.layouts, {})["rows"]
        result["host"] = {**asdict(tiny), "steps": HOST_STEPS, "rows": rows}
    layouts = dict.fromkeys(args.contenders, args.layouts[-1])
    if "time" in args.measure:
        for setting, env in settings.items():
            rows = spawn("time", config, args, args.contenders, args.layouts, env)["rows"]
            result["time"][setting] = rows
        layouts = {n: row["layout"] for n, row in next(iter(result["time"].values())).items()}
    for contender in args.contenders if "memory" in args.measure else ():

        def run(env: Mapping[str, str], contender: str = contender) -> int:
            mine = (config, args, [contender], [layouts[contender]], env)
            return spawn("memory", *mine)["bytes"]

        got, needed = measuring.measure_memory(args.device, run)
        result["memory"][contender] = statistics.median(got)
        result.setdefault("memory_of_each_process", {})[contender] = got
        if needed is not None:
            result.setdefault("memory_needed", {})[contender] = needed
    if args.memory_limit:
        limit = int(args.memory_limit * 2**30)
        result["memory_limit"] = limit
        result["largest_batch"] = {
            contender: largest_batch(result, contender, limit, args)
            for contender in args.contenders
        }
    return result


def largest_batch(result: dict[str, Any], name: str, limit: int, args: argparse.Namespace) -> int:
    """The largest batch whose steps need at most ``limit`` bytes, to 5 %; each try scales the last."""
    fields = {f: result[f] for f in Configuration.__dataclass_fields__}
    rows = next(iter(result["time"].values()), {})
    layout = rows[name]["layout"] if rows else args.layouts[-1]
    needed = {result["batch"]: result["memory"][name]}
    while True:
        last = next(reversed(needed))
        batch = max(1, int(last * limit / needed[last]))
        fitting = [b for b, got in needed.items() if got <= limit]
        if batch in needed or (fitting and 0 <= batch - max(fitting) <= batch // 20):
            return max(fitting, default=0)
        config = Configuration(**{**fields, "batch": batch})
        needed[batch] = spawn("memory", config, args, [name], [layout], {})["bytes"]


def table(result: dict[str, Any], args: argparse.Namespace) -> str:
    """The figures of one configuration, as text."""
    lines = [f"{result['configuration']}, batch {result['batch']}"]
    settings = dict(result["time"])
    if "host" in result:
        settings["host"] = result["host"]["rows"]
    for name in args.contenders:
        cells = [measuring.text_of_time(setting, rows[name]) for setting, rows in settings.items()]
        cells += filter(None, [measuring.text_of_memory(result, name)])
        lines.append(f"  {name:10s} | " + " | ".join(cells))
    if "largest_batch" in result:
        found = ", ".join(f"{name} {batch}" for name, batch in result["largest_batch"].items())
        lines.append(f"  largest batch in {result['memory_limit'] / 2**30:g} GiB: {found}")
    return "\n".join(lines)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.step",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    known = ", ".join(CONFIGURATIONS)
    parser.add_argument("configurations", nargs="*", help=f"of: {known}; none: all")
    parser.add_argument(
        "--batch", type=int, nargs="+", help="batch sizes, for the configurations' own"
    )
    measuring.add_options(parser, CONTENDERS, rounds=7)
    parser.add_argument(
        "--measure", nargs="+", default=["time", "memory"], choices=("time", "memory", "host")
    )
    parser.add_argument(
        "--width", type=float, default=1 / 32, help="of the VGGs that host time is measured on"
    )
    parser.add_argument(
        "--memory-limit", type=float, metavar="GIB", help="also find the largest batch within it"
    )
    args = parser.parse_args(argv)
    for name in args.configurations:
        if name not in CONFIGURATIONS:
            parser.error(f"unknown configuration {name!r}; expected of: {known}")
    return args


def main() -> None:
    args = parse()
    if args.worker:
        print(json.dumps(worker(args)))
        return
    results = []
    for name in args.configurations or CONFIGURATIONS:
        for batch in args.batch or [CONFIGURATIONS[name].batch]:
            config = dataclasses.replace(CONFIGURATIONS[name], batch=batch)
            results.append(measure(name, config, args))
            print(table(results[-1], args), flush=True)
            measuring.write_json(args, MODULE, results)


if __name__ == "__main__":
    main()
