"""Loads the native operators, and puts their references in the place of those that are missing.

Every operator exists, with the same derivative and the same errors, whatever could be loaded. On a
device that has no native kernel for it, its reference runs, and says so once. So it does on a card for
which the CUDA library holds no code: that is found out when CUDA is first used, since an import that
initialised CUDA would break every process that forks.
"""

from __future__ import annotations

import ctypes
import json
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.overrides
from torch.autograd import forward_ad

from fastjac.errors import FastjacError
from fastjac.ops import _cuda_build
from fastjac.ops._cuda_build import CudaBuild

PACKAGE = Path(__file__).resolve().parent.parent
REBUILD = "pip install --no-build-isolation ."
EXPLAIN = "python -m fastjac.info"


@dataclass(frozen=True)
class NativeLibrary:
    """One shared object: where it is, and why it is not loaded (None: it is)."""

    name: str
    path: Path | None
    problem: str | None
    broken: bool = False  # it is there, and should have loaded
    build: CudaBuild | None = None  # of the CUDA library: what it was built for

    @property
    def loaded(self) -> bool:
        return self.problem is None


def build_record() -> dict:
    """What ``setup.py`` noted about the last build; empty if nothing was built."""
    try:
        return json.loads((PACKAGE / "_build.json").read_text())
    except (OSError, ValueError):
        return {}


_CAPABILITIES = {"avx2": ("AVX2", "AVX512"), "avx512": ("AVX512",)}  # as PyTorch names them


def _instruction_sets() -> set[str]:
    """Those of this processor, beyond the portable one."""
    has = torch.backends.cpu.get_cpu_capability()
    return {isa for isa, enough in _CAPABILITIES.items() if has in enough}


def _load(name: str, needs: NativeLibrary | None = None) -> NativeLibrary:
    path = next(iter(sorted(PACKAGE.glob(f"_{name}.*.so"))), None)
    if os.environ.get("FASTJAC_NATIVE") == "0":
        advice = "" if path is None else f"; unset it to load {path.name}"
        return NativeLibrary(name, path, f"FASTJAC_NATIVE=0 is set{advice}")
    if name == "cuda" and torch.version.cuda is None:
        return NativeLibrary(name, path, f"PyTorch {torch.__version__} has no CUDA")
    if path is None:
        reason = build_record().get("missing", {}).get(name, "it was not built")
        return NativeLibrary(name, None, reason)
    if needs is not None and not needs.loaded:
        return NativeLibrary(name, path, f"{needs.name} is not loaded: {needs.problem}")
    only = build_record().get("libraries", {}).get(name, {}).get("instruction_set")
    if only in _CAPABILITIES and only not in _instruction_sets():
        problem = (
            f"it was built for {only} alone (FASTJAC_BUILD_FOR=here), which this processor lacks"
        )
        return NativeLibrary(name, path, f"{path.name} is not loaded: {problem}", broken=True)
    build = None
    if name == "cuda":
        build, problem = CudaBuild.read(path), "it was built from other sources"
        if build is not None:
            problem = build.pytorch_problem(torch.version.cuda)
        if problem is not None:
            problem = f"{path.name} is not loaded: {problem}"
            return NativeLibrary(name, path, problem, broken=True, build=build)
    try:
        torch.ops.load_library(path)
    except (OSError, RuntimeError) as error:
        # PyTorch says that it failed, and its cause says why.
        reason = str(error.__cause__ or error).strip().splitlines()[0]
        return NativeLibrary(name, path, f"{path.name} does not load: {reason}", True, build)
    return NativeLibrary(name, path, None, build=build)


def _warn(message: str) -> None:
    # Attributed to no file: Python would print a line of this one below the message.
    warnings.warn_explicit(message, RuntimeWarning, "fastjac", 1)


_WORDS = {
    "FASTJAC_NATIVE": ("0", "1", "keep"),  # keep: for setup.py
    "FASTJAC_CPU_ISA": ("portable", "avx2", "avx512"),
}
for _name, _known in _WORDS.items():
    if (_word := os.environ.get(_name)) and _word not in _known:
        _warn(f"{_name}={_word} has no effect; expected one of {', '.join(_known)}")

CPU = _load("cpu")
CUDA = _load("cuda", needs=CPU)  # the schemas are in the CPU's
LIBRARIES = {"cpu": CPU, "cuda": CUDA}  # by the type of device

if not CPU.loaded:
    _warn(
        f"running without native operators, on their PyTorch references ({CPU.problem}); "
        f"to build them: {REBUILD}; for details: {EXPLAIN}"
    )
elif CUDA.broken:
    _warn(f"running without CUDA operators ({CUDA.problem}); to rebuild: {REBUILD}")


_unsupported: dict[int, str] = {}  # by a card's index: why the CUDA library cannot run on it
_references: dict[str, Callable] = {}  # by the operator's name
_operators: dict[str, torch._ops.OpOverload] = {}
_overrides = torch.library.Library("fastjac", "FRAGMENT")


def native(device: torch.device) -> bool:
    """Whether the operators are native on a tensor's device, and so faster than PyTorch's own."""
    library = LIBRARIES.get(device.type)
    if library is None or not library.loaded:
        return False
    return device.type != "cuda" or device.index not in _unsupported


def unsupported_cards() -> dict[int, str]:
    """Why the CUDA library cannot run on cards, by their index; CUDA is initialised."""
    return dict(_unsupported)


def _inspect_cards() -> None:
    """Route the operators past the CUDA library on those cards that it cannot run on."""
    driver, cards = _cuda_build.machine()
    capabilities = set()
    for index, card in enumerate(cards):
        problem = CUDA.build.card_problem(driver, card.capability)
        if problem is not None:
            _unsupported[index] = problem
            capabilities.add(card.capability)
    if not _unsupported:
        return
    named = ", ".join(f"cuda:{i} ({cards[i].name}, {cards[i].capability})" for i in _unsupported)
    problems = "; ".join(dict.fromkeys(_unsupported.values()))
    wanted = ";".join(map(str, sorted(capabilities)))
    _warn(
        f"running without CUDA operators on {named}, on their PyTorch references: {problems}; "
        f"to build them: TORCH_CUDA_ARCH_LIST='{wanted}' {REBUILD}; for details: {EXPLAIN}"
    )
    for name in _references:
        _route(name)


def _route(name: str, key: str = "CUDA") -> None:
    """Run the operator's reference on unsupported cards, and its kernel on the others."""
    qualified, reference = f"fastjac::{name}", _references[name]
    if not torch._C._dispatch_has_kernel_for_dispatch_key(qualified, key):
        return
    kernel = torch.library.get_kernel(qualified, key)

    def run(keys: torch.DispatchKeySet, *args: Any) -> Any:
        if args[0].get_device() in _unsupported:
            return reference(*args)
        return kernel.call_boxed(keys, *args)

    with warnings.catch_warnings():
        # PyTorch 2.11 warns of every override, this one too, which is meant.
        warnings.filterwarnings("ignore", "Warning only once for all operators")
        _overrides.impl(name, run, key, with_keyset=True, allow_override=True)


if CUDA.loaded:
    torch.cuda._lazy_call(_inspect_cards)  # once CUDA is initialised


def cpu_isa() -> str:
    """The instruction set that the CPU's operators use; they are loaded."""
    get = ctypes.CDLL(str(CPU.path)).fastjac_cpu_isa
    get.restype = ctypes.c_char_p
    return get().decode()


def define(schema: str, reference: Callable) -> None:
    """Makes ``torch.ops.fastjac.<name>`` exist, with ``reference`` where there is no native kernel.

    Args:
        schema: the operator's declaration, the same as in ``csrc/schema.cpp``.
        reference: takes and returns what the schema says.

    Raises:
        ImportError: the native library declares another schema, so it was built from other sources.
    """
    name = schema.partition("(")[0]
    qualified = f"fastjac::{name}"
    if hasattr(torch.ops.fastjac, name):
        found = str(getattr(torch.ops.fastjac, name).default._schema)
        if found != str(torch._C.parse_schema(f"fastjac::{schema}")):
            raise ImportError(
                f"{CPU.path} was built from other sources: it declares {found}, expected {schema}; "
                f"rebuild it: {REBUILD}"
            )
    else:
        torch.library.define(qualified, schema.removeprefix(name))
        if CPU.loaded:
            _warn(f"{CPU.path} was built before {name} existed; to rebuild it: {REBUILD}")

    torch.library.impl(qualified, "default")(_stand_in(name, reference))
    _references[name] = reference
    _operators[name] = getattr(torch.ops.fastjac, name).default
    if _unsupported:
        _route(name)


def call(name: str, *args: Any) -> Any:
    """``torch.ops.fastjac.<name>(*args)``, past its autograd entry where that has nothing to record.

    The entry is PyTorch's for operators from outside: in Python (torch/_library/autograd.py, which asks
    the same of the same private names), and a third of a small call's time. The caller has refused
    forward-mode tangents, which it would see too.
    """
    op = _operators[name]
    if (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch.overrides.has_torch_function(args)
        or (torch.is_grad_enabled() and torch._C._any_requires_grad(*args))
    ):
        return op(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)


def refuse_derivative(name: str, instead: str) -> None:
    """Makes a derivative of ``torch.ops.fastjac.<name>`` an error; ``instead`` says what there is."""

    def backward(ctx: Any, *_: Any) -> None:
        raise FastjacError(f"{name}: its derivative is not supported; {instead}")

    torch.library.register_autograd(f"fastjac::{name}", backward)


def refuse_forward_mode(name: str, *tensors: torch.Tensor | None) -> None:
    """Raises where a tensor carries a forward-mode tangent, which PyTorch would drop silently."""
    # The level is -1 outside of forward mode; unpack_dual alone would cost every call.
    if forward_ad._current_level >= 0:
        for x in tensors:
            if x is not None and forward_ad.unpack_dual(x).tangent is not None:
                raise FastjacError(f"{name}: forward-mode derivatives (jvp) are not supported")


def _stand_in(name: str, reference: Callable) -> Callable:
    """``reference``, saying once for each device type that it runs and why."""
    # Of these, the import has said it.
    said = {"cpu", *(["cuda"] if CUDA.broken else [])}

    def run(*args):
        device = next(x.device.type for x in args if isinstance(x, torch.Tensor))
        if device not in said:
            said.add(device)
            reason = (CUDA.problem if device == "cuda" else None) or "there is no native kernel"
            _warn(
                f"{name} runs its PyTorch reference on {device!r} ({reason}); "
                f"for details: {EXPLAIN}"
            )
        return reference(*args)

    return run
