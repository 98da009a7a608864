"""One training step of distillation: plain, and with Jacobian matching by every way there is.

A step is student and teacher forward, the loss and its backward; no optimiser. The loss is
cross-entropy, squared error of the logits and, for a window, attention matching; to these all but the
``plain`` ones add the Jacobian term. The contenders:

    plain            no Jacobian term, eager
    plain-compiled   the same, networks and loss as one graph of ``torch.compile``
    fused            plain, on networks that ``fastjac.fuse`` has rewritten
    naive            the usual code: ``autograd.grad(create_graph=True)``, then ``backward``
    naive-compiled   that as one graph, by ``torch._dynamo.config.trace_autograd_ops``
    func-compiled    ``torch.func.grad`` of a loss with ``torch.func.grad`` inside, compiled
    make_fx          ``make_fx`` of the loss with the parameters as inputs, compiled
    make_fx-core     the same with ``core_aten_decompositions``: wrong for a BatchNorm in train mode
    jvp-of-grad      ``torch.func.jvp`` of the parameters' gradient, along the loss's slope in J
    grad-of-jvp      the other order: wrong for a BatchNorm in train mode
    reference        ``JacobianMatching(strategy="autograd")``: naive, with the statistics asked for
    jax              the double gradient in JAX, jitted; where jax is installed, without autocast
    crop-compiled    the double backward, compiled, of the crops that the window sees
    fastjac          ``JacobianMatching``
    fastjac-behind   the same, what lies behind the target's layer compiled (ResNet)
    without-winograd, -pool-2x2, -pool-3x3, -recomputed-convolution, -recomputed-chain, -fusion
                     ``fastjac`` without one of the things that make it fast

The rivals take batch statistics in every configuration, since frozen ones would cost them a second
forward; ``crop-compiled`` makes that forward on crops, frozen. Each is compared with the reference in
float64 before anything is timed, and one that is wrong is not timed. A contender in a configuration that
it cannot serve is left out. On a GPU, ``plain-graphed``, ``fastjac-graphed`` and so on are those steps
under ``fastjac.graphed``.

Time: all contenders in turn in one process, each in its better memory layout (compiled ones in
channels-last); median with 20 % and 80 % quantiles, and the ratio to the first round by round. On a
CPU it is taken under ``--allocators``: the default, and one that keeps its pages. Of fastjac's step,
also the sweeps' time. Of every eager step, its FLOP (of a Winograd convolution, what it does), and
beside them the FLOP per second of a large matrix product or 1 x 1 convolution in that process, the
faster of the two: a step takes their quotient at least.
First: in a new process and without any cache of the compiler, seconds from the networks to the end of
the first step and of the tenth, and of the first step at another size of batch.
Host: the same as time, with one image of the smallest size and networks of a few channels (``--width``),
so that arithmetic is negligible: what the host does for a step, and a GPU may wait for.
Memory: peak resident memory of three steps over that before the first, each contender in processes of
its own, the median; under the default allocator, whose heap keeps what it cannot return, more in one
process and less in another. On a CPU also under one that maps every tensor of a MiB by itself: what the
steps need. On a GPU, what PyTorch's allocator says, which does not vary: one process.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib.util
import json
import statistics
import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import fastjac
from benchmarks import contenders, measuring, rivals
from benchmarks.contenders import CONFIGURATIONS, Configuration, Contender

MODULE = "benchmarks.step"
spawn = functools.partial(measuring.spawn, MODULE)
CONTENDERS = ("plain", "plain-compiled", "naive", "naive-compiled", "crop-compiled", "fastjac")
HOST_STEPS = 200
WRONG = 1e-9  # a relative error of the gradient in float64 above it
UNCACHED = {"TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}


WAYS: dict[str, type[Contender]] = {
    "plain": contenders.Contender,
    "plain-compiled": contenders.PlainCompiled,
    "fused": contenders.Fused,
    "naive": rivals.DoubleBackward,
    "naive-compiled": rivals.DoubleBackwardCompiled,
    "func-compiled": rivals.FunctionalCompiled,
    "make_fx": rivals.Traced,
    "make_fx-core": rivals.TracedDecomposed,
    "jvp-of-grad": rivals.ForwardOverReverse,
    "grad-of-jvp": rivals.ReverseOverForward,
    "crop-compiled": rivals.Cropped,
    "reference": contenders.Reference,
    "fastjac": contenders.Matching,
    "fastjac-behind": contenders.MatchingCompiledBehind,
    **{f"without-{part}": contenders.without(part) for part in contenders.PARTS},
}


def way(name: str) -> type[Contender]:
    """The class of a contender, graphed or not."""
    if name == "jax":
        from benchmarks.rivals_jax import JaxDoubleGradient

        return JaxDoubleGradient
    return WAYS[name.removesuffix("-graphed")]


def contender(
    name: str, config: Configuration, layout: str, device: str, amp: bool, double: bool = False
) -> Contender:
    """The contender of this name; with ``-graphed`` behind it, under ``fastjac.graphed``."""
    found = way(name)(config, layout, device, amp, double)
    if name.endswith("-graphed"):
        found.taken = fastjac.graphed(found.take, warmup=2)
    return found


def serves(name: str, config: Configuration) -> bool:
    """Whether a contender can take the step of a configuration."""
    if name == "fastjac-behind":
        return config.layer == "layer1"
    if not way(name).jacobians or issubclass(way(name), contenders.Matching):
        return True
    if name == "crop-compiled" and (config.batch_stats != "frozen" or not config.before):
        return False
    return config.target == "label" and "+" not in config.layer


def validate(name: str, config: Configuration, device: str) -> float:
    """The relative error of a contender's parameter gradient, float64, batch 2, small images."""
    small = dataclasses.replace(config, batch=2, size=min(config.size, 112))
    tried = contender(name, small, "channels_last", device, amp=False, double=True)
    tried.step()
    same = dataclasses.replace(small, batch_stats=tried.batch_stats)
    reference = contenders.Reference(same, "channels_last", device, amp=False, double=True)
    reference.step()
    return measuring.relative_error(tried.student, reference.student)


def time_steps(args: argparse.Namespace, config: Configuration, rounds: int) -> dict[str, Any]:
    """Seconds per step of every contender in every layout, round by round."""
    taken = {
        (name, layout): contender(name, config, layout, args.device, args.amp)
        for name in args.contenders
        for layout in layouts_of(name, args)
    }
    seconds = measuring.time_in_turn(taken, rounds)
    rows = measuring.compare(seconds)
    for name, row in rows.items():
        fastest = taken[name, row["layout"]]
        row["flop"] = measuring.flop(fastest)
        if name == "fastjac":
            row["sweeps_s"] = measuring.sweep_seconds(fastest, args.device)
    return rows


def layouts_of(name: str, args: argparse.Namespace) -> list[str]:
    """Those of ``--layouts`` that the contender is worth measuring in; the last of all if none is."""
    own = way(name).layouts
    return [layout for layout in args.layouts if layout in own] or args.layouts[-1:]


def peak_memory(args: argparse.Namespace, config: Configuration) -> int:
    """Bytes that steps of the one contender need."""
    name, how = args.contenders[0], (args.layouts[0], args.device, args.amp)
    taken, small = contender(name, config, *how), dataclasses.replace(config, size=32, batch=2)
    # Compiling at another size would be another compilation, whose memory stays.
    warm = taken if "layouts" in vars(type(taken)) else contender(name, small, *how)
    return measuring.peak_memory(taken, args.device, warm=warm.step)


def first_steps(args: argparse.Namespace, config: Configuration) -> dict[str, float]:
    """Seconds until the first and the tenth step end, and of the first at another size of batch."""
    start = time.perf_counter()
    taken = contender(args.contenders[0], config, args.layouts[0], args.device, args.amp)
    ends = []
    for _ in range(10):
        taken.step()
        ends.append(time.perf_counter() - start)
    taken.x, taken.y = taken.x[:-1], taken.y[:-1]
    start = time.perf_counter()
    taken.step()
    return {"first": ends[0], "tenth": ends[-1], "other_batch": time.perf_counter() - start}


def worker(args: argparse.Namespace) -> dict[str, Any]:
    """What the process that measures prints."""
    config = Configuration(**json.loads(args.worker_config))
    if args.worker in ("time", "host"):
        rounds = args.rounds if args.worker == "time" else HOST_STEPS
        rows = time_steps(args, config, rounds)
        return {"rows": rows, "flop_per_second": measuring.flop_per_second(args.device, args.amp)}
    if args.worker == "validate":
        return {"error": validate(args.contenders[0], config, args.device)}
    if args.worker == "first":
        return first_steps(args, config)
    return {"bytes": peak_memory(args, config)}


def host_configuration(config: Configuration, args: argparse.Namespace) -> Configuration:
    """The configuration with next to no arithmetic, of the same operations."""
    return dataclasses.replace(config, size=64, batch=1, width=args.width)


def measure(name: str, config: Configuration, args: argparse.Namespace) -> dict[str, Any]:
    """Every figure of one configuration."""
    result: dict[str, Any] = {"configuration": name, **asdict(config), "time": {}, "memory": {}}
    result["gradient_error_float64"] = errors = {}
    tried = [each for each in args.contenders if serves(each, config)]
    for each in tried:
        if way(each).jacobians:
            errors[each] = spawn("validate", config, args, [each], args.layouts, {})["error"]
    names = [each for each in tried if errors.get(each, 0) <= WRONG]
    if "fastjac" in errors and "fastjac" not in names:
        raise SystemExit(f"{name}: fastjac's gradient is off by {errors['fastjac']:.1e}")
    if "host" in args.measure:
        tiny = host_configuration(config, args)
        rows = spawn("host", tiny, args, names, args.layouts, {})["rows"]
        result["host"] = {**asdict(tiny), "steps": HOST_STEPS, "rows": rows}
    layouts = {each: layouts_of(each, args)[-1] for each in names}
    if "time" in args.measure:
        for setting in args.allocators if args.device == "cpu" else ["device"]:
            env = measuring.ALLOCATORS.get(setting, {})
            found = spawn("time", config, args, names, args.layouts, env)
            result["time"][setting] = found["rows"]
            result.setdefault("flop_per_second", {})[setting] = found["flop_per_second"]
        layouts = {n: row["layout"] for n, row in next(iter(result["time"].values())).items()}
    if "first" in args.measure:
        result["first"] = {
            each: spawn("first", config, args, [each], [layouts[each]], UNCACHED) for each in names
        }
    for each in names if "memory" in args.measure else ():

        def run(env: Mapping[str, str], each: str = each) -> int:
            return spawn("memory", config, args, [each], [layouts[each]], env)["bytes"]

        got, needed = measuring.measure_memory(args.device, run, args.memory_processes)
        result["memory"][each] = statistics.median(got)
        result.setdefault("memory_of_each_process", {})[each] = got
        if needed is not None:
            result.setdefault("memory_needed", {})[each] = needed
    if args.memory_limit:
        limit = int(args.memory_limit * 2**30)
        result["memory_limit"] = limit
        result["largest_batch"] = {each: largest_batch(result, each, limit, args) for each in names}
    return result


def largest_batch(result: dict[str, Any], name: str, limit: int, args: argparse.Namespace) -> int:
    """The largest batch whose steps need at most ``limit`` bytes, to 5 %; each try scales the last."""
    fields = {f.name: result[f.name] for f in dataclasses.fields(Configuration)}
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
    errors = result["gradient_error_float64"]
    for name in args.contenders:
        if errors.get(name, 0) > WRONG:
            lines.append(f"  {name:14s} | wrong: the gradient is off by {errors[name]:.1e}")
            continue
        measured = {s: rows[name] for s, rows in settings.items() if name in rows}
        cells = [measuring.text_of_time(setting, row) for setting, row in measured.items()]
        if name in result["memory"]:
            cells.append(measuring.text_of_memory(result, name))
        if name in result.get("first", {}):
            first = result["first"][name]
            cells.append(
                f"first step {first['first']:.1f} s, tenth {first['tenth']:.1f} s, "
                f"at another batch {first['other_batch']:.1f} s"
            )
        if cells:
            lines.append(f"  {name:14s} | " + " | ".join(cells))
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
        *("--measure", "-m"),
        nargs="+",
        default=["time", "memory"],
        choices=("time", "memory", "first", "host"),
    )
    parser.add_argument(
        "--vary",
        nargs="+",
        metavar=("FIELD", "VALUE"),
        help="a field of the configuration (size, layer, window, student, ...) and its values in turn",
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
    for name in args.contenders:
        if name.removesuffix("-graphed") not in {*WAYS, "jax"}:
            parser.error(f"unknown contender {name!r}; expected of: {', '.join(WAYS)}, jax")
        if name == "jax" and (args.amp or not importlib.util.find_spec("jax")):
            parser.error("jax: expected the package jax, and no --amp")
    known_fields = {f.name: f.type for f in dataclasses.fields(Configuration)}
    if args.vary and (len(args.vary) < 2 or args.vary[0] not in known_fields):
        parser.error(f"--vary: expected one of {', '.join(known_fields)} and values")
    return args


def chosen(args: argparse.Namespace) -> list[tuple[str, Configuration]]:
    """The configurations to measure, with their names."""
    found = []
    for name in args.configurations or CONFIGURATIONS:
        config = CONFIGURATIONS[name]
        for batch in args.batch or [config.batch]:
            found.append((name, dataclasses.replace(config, batch=batch)))
    if not args.vary:
        return found
    field, *values = args.vary
    kind = type(getattr(CONFIGURATIONS["vgg4-32"], field))
    return [
        (f"{name}, {field} {value}", dataclasses.replace(config, **{field: kind(value)}))
        for name, config in found
        for value in values
    ]


def main() -> None:
    args = parse()
    if args.worker:
        print(json.dumps(worker(args)))
        return
    results = []
    for name, config in chosen(args):
        results.append(measure(name, config, args))
        print(table(results[-1], args), flush=True)
        measuring.write_json(args, MODULE, results)


if __name__ == "__main__":
    main()
