"""One step with a gradient penalty: plain, by double backward, compiled, and by fastjac.

    python -m benchmarks.penalty --norm batch --compiled
    python -m benchmarks.penalty --norm group --penalty wgan-gp
    python -m benchmarks.penalty --network vit convnext sdf --compiled

The discriminator is DCGAN's: images of 64 x 64 pixels, four convolutions of 4 x 4 with stride 2 and 64,
128, 256, 512 channels, BatchNorm (``--norm batch``) or GroupNorm of 32 groups behind all but the first,
LeakyReLU of slope 0.2, and one more convolution of 4 x 4 to the logit D. A step of ``plain`` is the
forward of a batch of real images and of one of generated ones (given: no generator runs), each by
itself, the logistic loss E softplus(-D(real)) + E softplus(D(generated)), and its backward; no
optimiser. The others add the penalty gamma/2 E ||dD/dx||^2 on the real images (Mescheder et al., ICML
2018). ``--images real`` leaves the generated ones out, in every contender: the convolutions then take
three products each in ``plain``, and six with the penalty (9 of 6 with both).

With ``--penalty wgan-gp``, the loss is E D(generated) - E D(real), and the penalty
gamma E (||dD/dx|| - 1)^2 on images between the two (Gulrajani et al., NeurIPS 2017), which take a
forward of their own: its convolutions take twelve products where ``plain`` has six.

Other networks (``--network``), each with real inputs alone: timm's ``vit_tiny_patch16_224`` and
``convnext_atto`` on images of 224 x 224 with R1, and ``sdf``, the network of implicit geometric
regularisation (Gropp et al., ICML 2020): eight linear layers under weight norm, softplus of beta 100
between, its input joined in again in the middle; on 4096 points, E |D| + gamma E (||dD/dx|| - 1)^2.

``naive`` is the usual code: ``autograd.grad(create_graph=True)`` on the real images, then backward.
``compiled`` is that function of images and loss under ``torch.compile``, with
``torch._dynamo.config.trace_autograd_ops``, the real images a leaf passed in, and the backward outside.
``fastjac`` is ``with_jacobian`` and ``jacobian_norm_penalty``, with ``batch_stats="batch"``: the same
quantities, cross-sample terms of BatchNorm included.

Before anything is timed, the parameters' gradients of ``fastjac`` (and ``compiled``) in float64 are
compared with ``naive``'s. Time and memory as in ``benchmarks.step``; ``compiled`` has its compiler's
memory in it on a CPU.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.parametrizations import weight_norm

from benchmarks import measuring
from fastjac import Scalar, gradient_penalty, jacobian_norm_penalty, with_jacobian

MODULE = "benchmarks.penalty"
spawn = functools.partial(measuring.spawn, MODULE)
CONTENDERS = ("plain", "naive", "fastjac")
TIMM = {"vit": "vit_tiny_patch16_224", "convnext": "convnext_atto"}
NORMS = {"batch": nn.BatchNorm2d, "group": lambda channels: nn.GroupNorm(32, channels)}
GAMMA = 10.0


@dataclass(frozen=True)
class Configuration:
    """The discriminator, and its images."""

    norm: str = ""  # of dcgan
    network: str = "dcgan"
    images: str = "both"
    penalty: str = "r1"
    batch: int = 64
    size: int = 64
    channels: int = 3


class SignedDistance(nn.Module):
    """Points ``[B, 3]`` to distances ``[B]``."""

    def __init__(self, width: int = 256) -> None:
        super().__init__()
        widths = [3, width, width, width, width - 3, width, width, width, 1]
        inputs = [*widths[:4], width, *widths[5:8]]
        self.layers = nn.ModuleList(
            weight_norm(nn.Linear(*sizes)) for sizes in zip(inputs, widths[1:], strict=True)
        )

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for i, layer in enumerate(self.layers):
            y = layer(torch.cat([y, x], 1) / math.sqrt(2) if i == 4 else y)
            if i < len(self.layers) - 1:
                y = F.softplus(y, beta=100)
        return y[:, 0]


def network(config: Configuration) -> nn.Module:
    """Inputs to logits ``[B]``."""
    if config.network == "dcgan":
        return discriminator(config)
    if config.network == "sdf":
        return SignedDistance()
    import timm

    return nn.Sequential(timm.create_model(TIMM[config.network], num_classes=1), nn.Flatten(0))


def discriminator(config: Configuration) -> nn.Sequential:
    """DCGAN's: images ``[B, channels, 64, 64]`` to logits ``[B]``."""
    layers: list[nn.Module] = []
    channels = config.channels
    for width in (64, 128, 256, 512):
        layers.append(nn.Conv2d(channels, width, 4, 2, 1, bias=not layers))
        if len(layers) > 1:
            layers.append(NORMS[config.norm](width))
        layers.append(nn.LeakyReLU(0.2))
        channels = width
    return nn.Sequential(*layers, nn.Conv2d(channels, 1, 4, bias=False), nn.Flatten(0))


def logits_and_gradient(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """D(x) and dD/dx, with its graph; ``x`` is a leaf that requires a gradient."""
    logits = model(x)
    (gradient,) = torch.autograd.grad(logits.sum(), x, create_graph=True)
    return logits, gradient


class Contender:
    """One way of taking the step, on its own copy of the discriminator."""

    def __init__(
        self,
        name: str,
        config: Configuration,
        layout: str,
        device: str,
        amp: bool,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        torch.manual_seed(0)
        form = measuring.memory_format(layout)
        self.model = network(config).to(device, dtype, memory_format=form)
        shape = (config.batch, config.channels, config.size, config.size)
        if config.network == "sdf":
            shape, form = (config.batch, 3), torch.contiguous_format
        images = [(2 * torch.rand(shape) - 1).to(device, dtype, memory_format=form) for _ in "ab"]
        self.real, generated = images
        self.generated = generated if config.images == "both" else None
        self.name, self.device, self.amp = name, device, amp
        self.wgan, self.eikonal = config.penalty == "wgan-gp", config.penalty == "eikonal"
        self.x = self.real.lerp(generated, 0.3) if self.wgan else self.real  # penalised there
        self._compiled = None
        if name == "compiled":
            torch._dynamo.config.trace_autograd_ops = True
            self._compiled = torch.compile(self.loss, fullgraph=True)

    def penalised(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """D of the images and the penalty."""
        if self.name in ("naive", "compiled"):
            with sdpa_kernel(SDPBackend.MATH):  # the others have no second derivative
                logits, gradient = logits_and_gradient(self.model, x)
            norms = gradient.flatten(1).square().sum(1)
            if self.wgan or self.eikonal:
                return logits, GAMMA * (norms.sqrt() - 1).square().mean()
            return logits, GAMMA / 2 * norms.mean()
        target = Scalar(lambda logits, y: logits)
        out = with_jacobian(self.model, x, target, batch_stats="batch")
        if self.wgan or self.eikonal:
            return out.output, GAMMA * gradient_penalty(out.jacobian)
        return out.output, GAMMA / 2 * jacobian_norm_penalty(out.jacobian)

    def loss(self, x: Tensor) -> Tensor:
        """The loss of the step, penalised at ``x``."""
        penalty: Tensor | float = 0.0
        if self.name == "plain" or self.wgan:
            logits = self.model(self.real)
            if self.name != "plain":
                _, penalty = self.penalised(x)
        else:
            logits, penalty = self.penalised(x)
        if self.wgan:
            return self.model(self.generated).mean() - logits.mean() + penalty
        if self.eikonal:
            return logits.abs().mean() + penalty
        loss = F.softplus(-logits).mean() + penalty
        if self.generated is not None:
            loss = loss + F.softplus(self.model(self.generated)).mean()
        return loss

    def step(self) -> float:
        """Take the step; the loss."""
        return float(self.take(self.x))  # waits for the device

    def take(self, x: Tensor) -> Tensor:
        """The step, penalised at ``x``; the loss, for which nothing waits."""
        self.model.zero_grad(set_to_none=True)
        x = x.detach()
        if self.name in ("naive", "compiled"):
            x.requires_grad_()
        with torch.autocast(self.device, torch.bfloat16, enabled=self.amp):
            loss = (self._compiled or self.loss)(x)
        # The images' own gradient is not wanted; the compiled backward must compute it.
        if self.name == "naive":
            loss.backward(inputs=list(self.model.parameters()))
        else:
            loss.backward()
        return loss.detach()


def validate(config: Configuration, args: argparse.Namespace) -> dict[str, float]:
    """Relative errors of the parameters' gradients against the double backward's, float64, batch 4."""
    small = replace(config, batch=4)
    models = {}
    for name in dict.fromkeys(["naive", *args.contenders]):
        if name != "plain":
            how = ("channels_last", args.device, False, torch.float64)
            contender = Contender(name, small, *how)
            contender.step()
            models[name] = contender.model
    reference = models.pop("naive")
    return {name: measuring.relative_error(m, reference) for name, m in models.items()}


def time_steps(args: argparse.Namespace, config: Configuration) -> dict[str, Any]:
    """Seconds per step of every contender in every layout, round by round."""
    contenders = {
        (name, layout): Contender(name, config, layout, args.device, args.amp)
        for name in args.contenders
        for layout in args.layouts
    }
    seconds = measuring.time_in_turn(contenders, args.rounds)
    rows = measuring.compare(seconds)
    for name, row in rows.items():
        contender = contenders[name, row["layout"]]
        if name == "fastjac":
            row["sweeps_s"] = measuring.sweep_seconds(contender, args.device)
    return rows


def peak_memory(args: argparse.Namespace, config: Configuration) -> int:
    """Bytes that steps of the one contender need."""
    name, how = args.contenders[0], (args.layouts[0], args.device, args.amp)
    contender, small = Contender(name, config, *how), replace(config, batch=2)
    warm = contender if name == "compiled" else Contender(name, small, *how)
    return measuring.peak_memory(contender, args.device, warm=warm.step)


def worker(args: argparse.Namespace) -> dict[str, Any]:
    """What the process that measures prints."""
    config = Configuration(**json.loads(args.worker_config))
    if args.worker == "time":
        return {"rows": time_steps(args, config)}
    if args.worker == "validate":
        return {"errors": validate(config, args)}
    return {"bytes": peak_memory(args, config)}


def measure(config: Configuration, args: argparse.Namespace) -> dict[str, Any]:
    """Every figure of one configuration."""
    result: dict[str, Any] = {**asdict(config), "gamma": GAMMA, "time": {}, "memory": {}}
    errors = spawn("validate", config, args, args.contenders, args.layouts, {})["errors"]
    result["gradient_error_float64"] = errors
    for name, error in errors.items():
        if not error <= 1e-9:
            raise SystemExit(f"{name}'s gradient is off by {error:.1e}; nothing was timed")
    for setting in args.allocators if args.device == "cpu" else ["device"]:
        env = measuring.ALLOCATORS.get(setting, {})
        rows = spawn("time", config, args, args.contenders, args.layouts, env)["rows"]
        result["time"][setting] = rows
    layouts = {name: row["layout"] for name, row in next(iter(result["time"].values())).items()}
    for name in args.contenders if "memory" in args.measure else ():

        def run(env: Mapping[str, str], name: str = name) -> int:
            return spawn("memory", config, args, [name], [layouts[name]], env)["bytes"]

        got, needed = measuring.measure_memory(args.device, run, args.memory_processes)
        result["memory"][name] = statistics.median(got)
        result.setdefault("memory_of_each_process", {})[name] = got
        if needed is not None:
            result.setdefault("memory_needed", {})[name] = needed
    return result


def table(result: dict[str, Any], args: argparse.Namespace) -> str:
    """The figures of one configuration, as text."""
    lines = [
        f"{result['network']}, {result['penalty']}, {result['norm'] or 'no'} norm, {result['images']} "
        f"images, batch {result['batch']}"
    ]
    for name in args.contenders:
        cells = [measuring.text_of_time(s, rows[name]) for s, rows in result["time"].items()]
        cells += filter(None, [measuring.text_of_memory(result, name)])
        lines.append(f"  {name:10s} | " + " | ".join(cells))
    return "\n".join(lines)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=f"python -m {MODULE}",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--network", nargs="+", choices=("dcgan", *TIMM, "sdf"), default=["dcgan"])
    parser.add_argument("--norm", nargs="+", choices=NORMS, default=list(NORMS))
    parser.add_argument("--images", choices=("both", "real"), default="both")
    parser.add_argument("--penalty", choices=("r1", "wgan-gp"), default="r1")
    parser.add_argument("--batch", type=int, help="default: 64; of vit and convnext 8, of sdf 4096")
    parser.add_argument("--compiled", action="store_true", help="also compiled: it takes minutes")
    parser.add_argument(
        "--measure", nargs="+", choices=("time", "memory"), default=["time", "memory"]
    )
    measuring.add_options(parser, CONTENDERS, rounds=7)
    args = parser.parse_args(argv)
    if args.penalty == "wgan-gp" and args.images == "real":
        parser.error("--penalty wgan-gp needs both kinds of images")
    if args.compiled:
        args.contenders.append("compiled")
    return args


def configurations(args: argparse.Namespace) -> list[Configuration]:
    """What is to be measured."""
    found = []
    for name in args.network:
        if name == "dcgan":
            batch = args.batch or 64
            found += [Configuration(n, name, args.images, args.penalty, batch) for n in args.norm]
        elif name == "sdf":
            found.append(Configuration("", name, "real", "eikonal", args.batch or 4096))
        else:
            found.append(Configuration("", name, "real", "r1", args.batch or 8, 224))
    return found


def main() -> None:
    args = parse()
    if args.worker:
        print(json.dumps(worker(args)))
        return
    results = []
    for config in configurations(args):
        results.append(measure(config, args))
        print(table(results[-1], args), flush=True)
        measuring.write_json(args, MODULE, results)


if __name__ == "__main__":
    main()
