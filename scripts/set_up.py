"""Compiles the extension for this machine, and installs the package from its source tree.

    python scripts/set_up.py train        # with the extras that are named; PyTorch is there already

Nothing is compiled if the libraries in ``fastjac/`` fit, or a wheel in ``dist/`` does: one that was
built from these very sources, runs on this processor, and has CUDA operators if they are wanted.
``FASTJAC_BUILD_FOR``, ``FASTJAC_CUDA`` and ``TORCH_CUDA_ARCH_LIST`` act as in ``setup.py``, but only
this machine is compiled for unless they ask for more; ``MAX_JOBS`` is how many files at once, and
``ccache`` is used where there is one.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "fastjac"
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
LOG = ROOT / "build" / "compile.log"


def say(text: str) -> None:
    print(f"fastjac: {text}", flush=True)


def load_setup() -> ModuleType:
    """``setup.py`` as a module: it says what is built, and of what."""
    spec = importlib.util.spec_from_file_location("fastjac_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def misfit(record: dict, setup: ModuleType) -> str | None:
    """Why libraries of which ``setup.py`` noted ``record`` can't be taken; None: they can."""
    if record.get("sources") != setup.source_hash():
        return "it was built from other sources"
    libraries = record["libraries"]
    try:
        cpp_extension = setup.torch_extension()
        only = setup.instruction_set(cpp_extension.get_cxx_compiler())
    except setup.Unavailable:
        only = None  # without a compiler, any library is better than none
    if "cpu" not in libraries:
        return "it has no CPU operators"
    has = libraries["cpu"].get("instruction_set")
    if has not in (None, only):
        return f"it is for {has} alone"
    try:
        setup.cuda_toolkit(setup.torch_extension())
    except setup.Unavailable:
        return None
    if "cuda" not in libraries:
        return "it has no CUDA operators"
    wanted = os.environ.get("TORCH_CUDA_ARCH_LIST")
    if wanted and wanted != libraries["cuda"]["architectures"]:
        return f"its CUDA operators are for {libraries['cuda']['architectures']}"
    return None


def in_place(setup: ModuleType) -> bool:
    """Whether the libraries in the source tree are those that would be compiled."""
    try:
        record = json.loads((PACKAGE / "_build.json").read_text())
    except (OSError, ValueError):
        return False
    if misfit(record, setup) is not None:
        return False
    # A build that failed has left its record beside older libraries.
    newest = max(p.stat().st_mtime for p in (ROOT / "csrc").rglob("*"))
    libraries = [PACKAGE / f"_{name}.abi3.so" for name in record["libraries"]]
    return all(p.exists() and p.stat().st_mtime >= newest for p in libraries)


def unpack_wheel(setup: ModuleType) -> bool:
    """Take the libraries of a wheel in ``dist/`` that fits; say why others do not."""
    for path in sorted((ROOT / "dist").glob("fastjac-*.whl")):
        with zipfile.ZipFile(path) as wheel:
            names = [n for n in wheel.namelist() if re.fullmatch(r"fastjac/_\w+\.abi3\.so", n)]
            if "fastjac/_build.json" not in wheel.namelist():
                continue
            reason = misfit(json.loads(wheel.read("fastjac/_build.json")), setup)
            supported = [*PIP, "install", "--dry-run", "--no-deps", "--no-index", str(path)]
            if reason is None and subprocess.run(supported, capture_output=True).returncode != 0:
                reason = "this Python or platform cannot install it"
            if reason is not None:
                say(f"dist/{path.name} is not used: {reason}")
                continue
            for stale in PACKAGE.glob("_*.abi3.so"):
                stale.unlink()
            for name in [*names, "fastjac/_build.json"]:
                wheel.extract(name, ROOT)
                os.utime(ROOT / name)
        say(f"the libraries of dist/{path.name} fit; nothing is compiled")
        return True
    return False


def compiling_environment() -> dict[str, str]:
    env = {"FASTJAC_BUILD_FOR": "here", "MAX_JOBS": str(os.cpu_count() or 1)} | os.environ
    if ccache := shutil.which("ccache"):
        # It takes the place of the compiler whose name it is called by.
        folder = ROOT / "build" / "ccache"
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("c++", "g++"):
            (folder / name).unlink(missing_ok=True)
            (folder / name).symlink_to(ccache)
        env["PATH"] = f"{folder}{os.pathsep}{env['PATH']}"
        if nvcc := shutil.which("nvcc"):
            env.setdefault("PYTORCH_NVCC", f"{ccache} {nvcc}")
    return env


def minutes(setup: ModuleType, env: dict[str, str]) -> tuple[str, float]:
    """What will be compiled, and about how long that takes on two cores."""
    try:
        cpp_extension = setup.torch_extension()
    except setup.Unavailable as reason:
        return f"nothing, {reason}: PyTorch's own operators run, slower", 0.1
    only = setup.instruction_set(cpp_extension.get_cxx_compiler())
    parts, took = [f"CPU operators ({only or 'all instruction sets'})"], 2.0 if only else 4.2
    try:
        setup.cuda_toolkit(cpp_extension)
        listed = setup.cuda_architectures(Path(cpp_extension.CUDA_HOME, "bin", "nvcc"))
        parts.append(f"CUDA operators ({listed})")
        took += 0.8 * len(listed.split(";"))
    except setup.Unavailable as reason:
        parts.append(f"no CUDA operators ({reason})")
    jobs = env["MAX_JOBS"]
    parts.append(f"{jobs} files at once" + (", through ccache" if "ccache" in env["PATH"] else ""))
    return ", ".join(parts), took


def compile_in_place(env: dict[str, str]) -> None:
    """Run ``setup.py``, and say which file is done; everything else goes to a log."""
    LOG.parent.mkdir(exist_ok=True)
    # build_py last: it notes what was built.
    words = [sys.executable, "setup.py", "build_ext", "--inplace", "build_py"]
    with LOG.open("w") as log, subprocess.Popen(
        words, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as run:  # fmt: skip
        for line in run.stdout:
            log.write(line)
            if done := re.match(r"\[(\d+)/(\d+)\].* -c (\S+)", line):
                say(f"  {done[1]} of {done[2]}: {Path(done[3]).name}")
            elif line.startswith("fastjac: "):
                print(line, end="", flush=True)
    if run.returncode != 0:
        tail = "\n".join(LOG.read_text().splitlines()[-40:])
        sys.exit(f"{tail}\nfastjac: the extension does not compile; all output is in {LOG}")


def main(extras: list[str]) -> None:
    env = compiling_environment()
    os.environ.update({k: env[k] for k in ("FASTJAC_BUILD_FOR", "PATH")})
    setup = load_setup()
    named = f"[{','.join(extras)}]" if extras else ""
    say(f"installing what .{named} needs, about a minute (in the meantime, the extension)")
    install = [*PIP, "install", "--no-build-isolation", "-e", f".{named}"]
    keep = {**os.environ, "FASTJAC_NATIVE": "keep"}
    with subprocess.Popen(install, cwd=ROOT, env=keep) as pip:
        if os.environ.get("FASTJAC_NATIVE") == "0":
            say("FASTJAC_NATIVE=0: no extension")
        elif in_place(setup):
            say("the extension is compiled already")
        elif not unpack_wheel(setup):
            what, took = minutes(setup, env)
            say(f"compiling {what}: about {took:.0f} min on two cores")
            if took > 1:
                say("norm_act_pool takes most of it: 3 min of one core for each instruction set")
            compile_in_place(env)
    if pip.returncode != 0:
        sys.exit("fastjac: pip could not install what the package needs (see above)")


if __name__ == "__main__":
    main(sys.argv[1:])
