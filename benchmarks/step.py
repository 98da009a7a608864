"""One training step: plain distillation, with Jacobian matching by double backward, and by fastjac.

    python -m benchmarks.step vgg9-224 resnet18-224 --batch 8

A step is student and teacher forward, the loss and its backward; no optimiser. The loss is
cross-entropy, squared error of the logits and, for a window, attention matching; ``naive`` and
``fastjac`` add the Jacobian term. ``naive`` is the usual code: one forward with batch statistics,
``autograd.grad(create_graph=True)``, backward; it runs with ``batch_stats="batch"`` in every
configuration, since frozen statistics would cost it a second forward. ``--contenders plain fused``
compares the plain step with itself on networks that ``fastjac.fuse`` has rewritten; in a configuration
without a layer, since a layer's features end a chain. ``compiled`` is the plain step with both networks
under ``torch.compile``; on a CPU its memory has the compiler's in it.

Time: all contenders in turn in one process, each in its better memory layout; median with 20 % and
80 % quantiles, and the ratio to plain round by round. On a CPU it is taken under two allocator
settings, the default and one that keeps its pages, and a profile says how much of it convolutions take,
PyTorch's and fastjac's own. Of fastjac's step, also the time in the Jacobian's own passes.
Memory: peak resident memory of three steps over that before the first, each contender in processes of
its own, the median of five; under the default allocator, whose heap keeps what it cannot return, more
in one process and less in another. On a CPU also under one that maps every tensor of a MiB by itself:
what the steps need. On a GPU, what PyTorch's allocator says, which does not vary: one process.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

PAGES_KEPT = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "17179869184",
    "MALLOC_TOP_PAD_": "268435456",
}
ALLOCATORS = {"pages kept": PAGES_KEPT, "default": {}}
PAGES_RETURNED = {"MALLOC_MMAP_THRESHOLD_": str(2**20)}
CONTENDERS = ("plain", "naive", "fastjac")
LAYOUTS = ("contiguous", "channels_last")
WARM = 3  # steps until the allocator has its pages


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


CONFIGURATIONS = {
    "vgg9-224": Configuration("vgg9", "vgg9", 224, 8, "pool2"),
    "vgg9-448": Configuration("vgg9", "vgg9", 448, 8, "pool2", window=1 / 10),
    "vgg9-224-batch": Configuration("vgg9", "vgg9", 224, 8, "pool2", batch_stats="batch"),
    "vgg9-224-logits": Configuration("vgg9", "vgg9", 224, 8),
    "resnet18-224": Configuration("resnet18", "resnet34", 224, 8, "layer1"),
    "vgg4-32": Configuration("vgg4", "vgg9", 32, 128, batch_stats="batch"),
}


def network(name: str, classes: int) -> Any:
    """A VGG of fastjac's, or a network of torchvision's."""
    import torchvision

    import fastjac.models.vgg as vgg

    if hasattr(vgg, name):
        return getattr(vgg, name)(classes)
    return torchvision.models.get_model(name, num_classes=classes)


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

        torch.manual_seed(0)
        nets = [network(n, config.classes) for n in (config.student, config.teacher)]
        form = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}[layout]
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

    def step(self) -> float:
        """Take the step; the loss."""
        import torch
        import torch.nn.functional as F

        import fastjac

        self.student.zero_grad(set_to_none=True)
        with torch.autocast(self.device, torch.bfloat16, enabled=self.amp):
            if self.jacobians:
                out = self.matcher(self.x, self.y)
                logits, logits_t = out.student_logits, out.teacher_logits
                features, features_t = out.student_features, out.teacher_features
                loss = out.jacobian_loss
            else:
                student, teacher = self.forwards
                with torch.no_grad():
                    logits_t, features_t = teacher(self.x)
                logits, features = student(self.x)
                loss = 0.0
            loss = loss + F.cross_entropy(logits, self.y)
            loss = loss + fastjac.activation_match_loss(logits, logits_t)
            if features is not None:
                loss = loss + fastjac.attention_match_loss(features, features_t)
        loss.backward()
        return float(loss.detach())  # waits for the device


def resident(field: str) -> int:
    """A field of this process's status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def validate(config: Configuration, device: str) -> float:
    """The relative error of fastjac's parameter gradient against the reference's, float64, batch 2."""
    import dataclasses

    import torch

    small = dataclasses.replace(config, batch=2, size=min(config.size, 112))
    gradients = []
    for name in ("reference", "fastjac"):
        contender = Contender(name, small, "channels_last", device, amp=False)
        contender.student.double()
        contender.teacher.double()
        contender.x = contender.x.double()
        contender.step()
        grads = [p.grad.flatten() for p in contender.student.parameters()]
        gradients.append(torch.cat(grads))
    return float((gradients[0] - gradients[1]).norm() / gradients[0].norm())


def time_steps(args: argparse.Namespace, config: Configuration) -> dict[str, Any]:
    """Seconds per step of every contender in every layout, round by round."""
    contenders = {
        (name, layout): Contender(name, config, layout, args.device, args.amp)
        for name in args.contenders
        for layout in args.layouts
    }
    for _ in range(WARM):
        for contender in contenders.values():
            contender.step()
    seconds: dict[tuple[str, str], list[float]] = {key: [] for key in contenders}
    for _ in range(args.rounds):
        for key, contender in contenders.items():
            start = time.perf_counter()
            contender.step()
            seconds[key].append(time.perf_counter() - start)
    best = {
        name: min(
            (layout for layout in args.layouts),
            key=lambda layout, name=name: statistics.median(seconds[name, layout]),
        )
        for name in args.contenders
    }
    rows = {}
    plain = seconds[args.contenders[0], best[args.contenders[0]]]
    for name in args.contenders:
        own = seconds[name, best[name]]
        low, _, _, high = statistics.quantiles(own, n=5) if len(own) > 1 else own * 4
        rows[name] = {
            "layout": best[name],
            "median_s": statistics.median(own),
            "quantiles_s": [low, high],
            "ratio": statistics.median(a / b for a, b in zip(own, plain, strict=True)),
            "seconds": {layout: seconds[name, layout] for layout in args.layouts},
        }
        if args.device == "cpu":
            share = convolution_share(contenders[name, best[name]])
            rows[name]["convolutions"] = share * rows[name]["ratio"]
        if name == "fastjac":
            rows[name]["passes_s"] = passes(contenders[name, best[name]], args.device)
    return rows


def passes(contender: Contender, device: str) -> float:
    """Seconds of a step in both networks' pullback and the student's pushforward; median of five."""
    from unittest import mock

    import torch

    from fastjac import engine

    spent = 0.0

    def timed(function: Any) -> Any:
        def run(*args: Any) -> Any:
            nonlocal spent
            wait()
            start = time.perf_counter()
            result = function(*args)
            wait()
            spent += time.perf_counter() - start
            return result

        return run

    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    steps = []
    with mock.patch.multiple(
        engine, pullback=timed(engine.pullback), pushforward=timed(engine.pushforward)
    ):
        for _ in range(5):
            spent = 0.0
            contender.step()
            steps.append(spent)
    return statistics.median(steps)


def convolution_share(contender: Contender) -> float:
    """The share of a step's operations that convolutions and their derivatives take; median of three."""
    from torch.profiler import ProfilerActivity, profile

    shares = []
    for _ in range(3):
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            contender.step()
        own = {e.key: e.self_cpu_time_total for e in profiled.key_averages()}
        convolutions = [t for key, t in own.items() if "convolution" in key or "winograd" in key]
        shares.append(sum(convolutions) / sum(own.values()))
    return statistics.median(shares)


def peak_memory(args: argparse.Namespace, config: Configuration) -> int:
    """Bytes that three steps of the one contender need, over what is there before the first."""
    import torch

    contender = Contender(args.contenders[0], config, args.layouts[0], args.device, args.amp)
    if args.device == "cuda":
        before = torch.cuda.memory_allocated()
        contender.step()  # what compiling takes is none of a step's
        torch.cuda.reset_peak_memory_stats()
        for _ in range(3):
            contender.step()
        return torch.cuda.max_memory_allocated() - before
    warm = Configuration(**{**asdict(config), "size": 32, "batch": 2})
    Contender(args.contenders[0], warm, args.layouts[0], args.device, args.amp).step()
    gc.collect()  # a trace is cyclic, and holds the warm step's networks
    ctypes.CDLL(None).malloc_trim(0)  # what the warm step left free is not there before
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    for _ in range(3):
        contender.step()
    return resident("VmHWM") - before


def worker(args: argparse.Namespace) -> dict[str, Any]:
    """What the process that measures prints."""
    config = Configuration(**json.loads(args.worker_config))
    if args.worker == "time":
        return {"rows": time_steps(args, config)}
    if args.worker == "validate":
        return {"error": validate(config, args.device)}
    return {"bytes": peak_memory(args, config)}


def spawn(
    task: str,
    config: Configuration,
    args: argparse.Namespace,
    contenders: list[str],
    layouts: list[str],
    env: dict[str, str],
) -> dict[str, Any]:
    """Measure in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.step", "--worker", task]
    command += ["--worker-config", json.dumps(asdict(config)), "--device", args.device]
    command += ["--rounds", str(args.rounds), *(["--amp"] if args.amp else [])]
    command += ["--contenders", *contenders, "--layouts", *layouts]
    done = subprocess.run(command, env={**os.environ, **env}, stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout)


def measure(name: str, config: Configuration, args: argparse.Namespace) -> dict[str, Any]:
    """Every figure of one configuration."""
    result: dict[str, Any] = {"configuration": name, **asdict(config), "time": {}, "memory": {}}
    error = spawn("validate", config, args, args.contenders, args.layouts, {})["error"]
    result["gradient_error_float64"] = error
    if error > 1e-9:
        raise SystemExit(f"{name}: fastjac's gradient is off by {error:.1e}; nothing was timed")
    settings = ALLOCATORS if args.device == "cpu" else {"device": {}}
    layouts = dict.fromkeys(args.contenders, args.layouts[-1])
    if "time" in args.measure:
        for setting, env in settings.items():
            rows = spawn("time", config, args, args.contenders, args.layouts, env)["rows"]
            result["time"][setting] = rows
        layouts = {n: row["layout"] for n, row in next(iter(result["time"].values())).items()}
    processes = 1 if args.device == "cuda" else 5
    for contender in args.contenders if "memory" in args.measure else ():
        mine = (config, args, [contender], [layouts[contender]])
        got = [spawn("memory", *mine, {})["bytes"] for _ in range(processes)]
        result["memory"][contender] = statistics.median(got)
        result.setdefault("memory_of_each_process", {})[contender] = got
        if args.device == "cpu":
            needed = spawn("memory", *mine, PAGES_RETURNED)["bytes"]
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


def table(result: dict[str, Any]) -> str:
    """The figures of one configuration, as text."""
    lines = [f"{result['configuration']}, batch {result['batch']}"]
    names = result["memory"] or next(iter(result["time"].values()))
    first = next(iter(names))
    for name in names:
        cells = [f"{name:10s}"]
        for setting, rows in result["time"].items():
            row = rows[name]
            low, high = (1e3 * q for q in row["quantiles_s"])
            cells.append(
                f"{setting}: {1e3 * row['median_s']:7.0f} ms ({low:.0f} to {high:.0f}) "
                f"{row['ratio']:.2f}x"
                + (f", convolutions {row['convolutions']:.2f}x" if "convolutions" in row else "")
            )
            if "passes_s" in row:
                cells[-1] += f", Jacobian passes {1e3 * row['passes_s']:.0f} ms"
        for memory in [result["memory"][name]] if result["memory"] else []:
            share = memory / result["memory"][first]
            cells.append(f"memory: {memory / 2**20:6.0f} MiB {share:.2f}x")
        if needed := result.get("memory_needed"):
            cells[-1] += f", needed {needed[name] / 2**20:.0f} MiB "
            cells[-1] += f"{needed[name] / needed[first]:.2f}x"
        lines.append("  " + " | ".join(cells))
    if "largest_batch" in result:
        found = ", ".join(f"{name} {batch}" for name, batch in result["largest_batch"].items())
        lines.append(f"  largest batch in {result['memory_limit'] / 2**30:g} GiB: {found}")
    return "\n".join(lines)


def environment(args: argparse.Namespace) -> dict[str, Any]:
    """What the figures depend on."""
    import torch

    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((s.split(":")[1].strip() for s in lines if s.startswith("model name")), cpu)
    gpu = torch.cuda.get_device_name() if args.device == "cuda" else None
    return {
        "command": "python -m benchmarks.step " + " ".join(sys.argv[1:]),
        "commit": commit,
        "cpu": cpu,
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


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
    parser.add_argument("--rounds", type=int, default=7, help="timed steps of each contender")
    parser.add_argument("--contenders", nargs="+", default=list(CONTENDERS))
    parser.add_argument("--layouts", nargs="+", default=list(LAYOUTS), choices=LAYOUTS)
    parser.add_argument(
        "--measure", nargs="+", default=["time", "memory"], choices=("time", "memory")
    )
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--amp", action="store_true", help="bfloat16 autocast")
    parser.add_argument(
        "--memory-limit", type=float, metavar="GIB", help="also find the largest batch within it"
    )
    parser.add_argument("--json", type=Path, help="write every figure to this file")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--worker-config", help=argparse.SUPPRESS)
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
    import dataclasses

    results = []
    for name in args.configurations or CONFIGURATIONS:
        for batch in args.batch or [CONFIGURATIONS[name].batch]:
            config = dataclasses.replace(CONFIGURATIONS[name], batch=batch)
            results.append(measure(name, config, args))
            print(table(results[-1]), flush=True)
            if args.json:  # each as it comes: an interrupted run keeps what it has measured
                args.json.parent.mkdir(parents=True, exist_ok=True)
                found = {**environment(args), "results": results}
                args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
