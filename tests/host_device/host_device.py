"""The device ``host``: memory of the host under another device type, with two indices.

Importing it registers the device with PyTorch, and our operators on it unless ``FASTJAC_NATIVE`` is
0. That is for good: only in a process of its own. ``FASTJAC_HOST_DEVICE`` says where CMake has built it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import torch

from fastjac.ops import _library

NAME = "host"
_built = Path(os.environ["FASTJAC_HOST_DEVICE"])
torch.ops.load_library(_built / "libhost_device.so")
_calls = torch.ops.host_device


def _index(device: torch.device | int | str) -> int:
    if isinstance(device, int):
        return device
    index = torch.device(device).index
    return _calls.current_device() if index is None else index


def _module() -> ModuleType:
    """``torch.host``: what PyTorch and we look for in a device's module."""
    module = ModuleType(f"torch.{NAME}")
    count = _calls.device_count()

    def get_rng_state(device: torch.device | int | str = NAME) -> torch.Tensor:
        return _calls.get_rng_state(_index(device))

    def set_rng_state(state: torch.Tensor, device: torch.device | int | str = NAME) -> None:
        _calls.set_rng_state(_index(device), state)

    def manual_seed_all(seed: int) -> None:
        for index in range(count):
            _calls.seed(index, seed)

    @contextmanager
    def on(device: torch.device | int | str) -> Iterator[None]:
        before = _calls.current_device()
        _calls.set_device(_index(device))
        try:
            yield
        finally:
            _calls.set_device(before)

    members = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: count,
        "current_device": _calls.current_device,
        "device": on,
        "set_device": lambda device: _calls.set_device(_index(device)),
        "_is_in_bad_fork": lambda: False,
        "manual_seed_all": manual_seed_all,
        "get_rng_state": get_rng_state,
        "set_rng_state": set_rng_state,
        "get_rng_state_all": lambda: [get_rng_state(i) for i in range(count)],
        "set_rng_state_all": lambda states: [set_rng_state(s, i) for i, s in enumerate(states)],
        "get_amp_supported_dtype": lambda: [torch.bfloat16, torch.float16],
    }
    for name, member in members.items():
        setattr(module, name, member)
    return module


torch.utils.rename_privateuse1_backend(NAME)
torch._register_device_module(NAME, _module())

NATIVE = os.environ.get("FASTJAC_NATIVE") != "0"
if NATIVE:
    _operators = _built / "libhost_operators.so"
    torch.ops.load_library(_operators)
    _library.LIBRARIES[NAME] = _library.NativeLibrary(NAME, _operators, None)

launches = _calls.launches  # how many kernels of fastjac's ran there


@contextmanager
def no_synchronisation() -> Iterator[None]:
    """Makes it an error where the host would wait for the device."""
    before = _calls.refuse_synchronisation(True)
    try:
        yield
    finally:
        _calls.refuse_synchronisation(before)


@contextmanager
def no_guards() -> Iterator[None]:
    """Plants a fault: the current device stays what it is."""
    _calls.ignore_guards(True)
    try:
        yield
    finally:
        _calls.ignore_guards(False)


@contextmanager
def wrong_launches() -> Iterator[None]:
    """Plants a fault: kernels are launched with twice the threads."""
    _calls.launch_wrongly(True)
    try:
        yield
    finally:
        _calls.launch_wrongly(False)
