"""Which changes to the code no test notices: deletes a statement or turns a condition, runs the tests.

    python -m tests.mutations fastjac/engine fastjac/targets.py fastjac/losses.py --sample 200 --seed 0

A mutant differs from the code in one place: a statement is ``pass``, a condition is negated, or a
comparison is swapped for its neighbour (``<`` for ``<=``, ``is`` for ``is not``). Imports, docstrings,
annotations and what an error's text is made of are left alone, and so is a ``return None`` that ends a
function. A first run of all tests, on the code as it is, notes which lines each test runs; it is kept
in ``build/`` until code or tests change. A mutant gets the tests that run its line: those first that
killed others in the same file, then one for each set of lines that tests run, then the rest. It survives
if all pass; a run that does not end is a kill.

All is done on a copy of the project. The tests are collected once; for each mutant, a forked child puts
its code in the place of the function's. What runs at import (its lines are noted, too) takes all tests
and a new process.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import functools
import gc
import hashlib
import inspect
import itertools
import json
import os
import random
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

import pytest
import torch

TESTS = ("tests/engine", "tests/test_targets.py", "tests/test_losses.py", "tests/test_recompute.py")
# What runs in processes that tests start, where lines are not noted. Other mutants meet them last.
ELSEWHERE = {"fastjac/engine/rules/synchronised.py": "tests/engine/test_distributed.py"}
COPIED = ("benchmarks", "examples", "fastjac", "tests", "conftest.py", "pyproject.toml")
OPTIONS = ("-x", "-q", "-p", "no:cacheprovider", "-p", "no:faulthandler")
OPTIONS += ("-m", "not check and not cuda")
PARTS = (8, 80, 1000, None)  # so many tests first, then, if they pass, those up to so many; all
SWAPPED = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
DELETED = (ast.Assign, ast.AugAssign, ast.AnnAssign, ast.Expr, ast.Return, ast.Raise)
DELETED += (ast.Delete, ast.Break, ast.Continue, ast.Assert)


@dataclass(frozen=True)
class Mutant:
    """One change of a file: its bytes from ``start`` to ``end`` are ``replacement``."""

    file: str
    lines: range
    start: int
    end: int
    replacement: str
    original: str
    at_import: bool

    def __str__(self) -> str:
        change = (
            "deleted" if self.replacement.startswith("pass") else f"-> {_short(self.replacement)}"
        )
        return f"{self.file}:{self.lines[0]}: {_short(self.original)}  {change}"


def _short(code: str) -> str:
    line = " ".join(code.split())
    return line if len(line) <= 100 else line[:97] + "..."


class Finder(ast.NodeVisitor):
    """The mutants of one file."""

    def __init__(self, file: str, source: bytes) -> None:
        self.file, self.source = file, source
        self.starts = [0, *itertools.accumulate(map(len, source.splitlines(keepends=True)))]
        self.depth = 0  # of functions
        self.ends: set[ast.stmt] = set()  # their last statements
        self.found: list[Mutant] = []

    def add(self, node: ast.AST, replacement: str) -> None:
        start = self.starts[node.lineno - 1] + node.col_offset
        end = self.starts[node.end_lineno - 1] + node.end_col_offset
        original = self.source[start:end].decode()
        lines = range(node.lineno, node.end_lineno + 1)
        blank = "\n" * (len(lines) - 1)  # so that what follows stays on its lines
        replacement = f"{replacement[:-1]}{blank})" if replacement != "pass" else f"pass{blank}"
        self.found.append(
            Mutant(self.file, lines, start, end, replacement, original, not self.depth)
        )

    def visit(self, node: ast.AST) -> None:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            return
        if isinstance(node, DELETED) and not self.does_nothing(node):
            self.add(node, "pass")
        if isinstance(node, ast.Raise | ast.JoinedStr):
            return  # text, for the most part an error's
        if isinstance(node, ast.If | ast.While | ast.IfExp):
            self.condition(node.test)
        for test in getattr(node, "ifs", ()):
            self.condition(test)
        if isinstance(node, ast.Compare):
            self.swap(node)
        function = isinstance(node, ast.FunctionDef | ast.Lambda)
        self.depth += function
        if isinstance(node, ast.FunctionDef):
            self.ends.add(node.body[-1])
        for name, child in ast.iter_fields(node):
            if name not in ("annotation", "returns"):
                for each in child if isinstance(child, list) else [child]:
                    if isinstance(each, ast.AST):
                        self.visit(each)
        self.depth -= function

    def does_nothing(self, node: ast.AST) -> bool:
        if isinstance(node, ast.Return) and node in self.ends:
            return node.value is None or ast.unparse(node.value) == "None"
        if isinstance(node, ast.Expr):
            return isinstance(node.value, ast.Constant)  # a docstring
        if isinstance(node, ast.AnnAssign):
            return node.value is None
        return isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"

    def condition(self, test: ast.expr) -> None:
        """The parts of a condition; comparisons are swapped wherever they are."""
        if isinstance(test, ast.BoolOp):
            for value in test.values:
                self.condition(value)
        elif isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
            self.condition(test.operand)
        elif not isinstance(test, ast.Compare):
            self.add(test, f"(not ({ast.unparse(test)}))")

    def swap(self, node: ast.Compare) -> None:
        for i, operator in enumerate(node.ops):
            ops = [*node.ops[:i], SWAPPED[type(operator)](), *node.ops[i + 1 :]]
            self.add(node, f"({ast.unparse(ast.Compare(node.left, ops, node.comparators))})")


def mutants_of(root: Path, path: str) -> list[Mutant]:
    """All mutants of a file, or of the files in a folder."""
    files = sorted((root / path).rglob("*.py")) if (root / path).is_dir() else [root / path]
    found = []
    for file in files:
        finder = Finder(str(file.relative_to(root)), file.read_bytes())
        finder.visit(ast.parse(file.read_bytes()))
        found += finder.found
    return found


def changed_functions(old: bytes, new: bytes, path: str) -> dict[CodeType, CodeType] | None:
    """The new code of the functions that differ, by the old; None where it cannot take its place."""
    before, after = (list(_functions(compile(source, path, "exec"))) for source in (old, new))
    if len(before) != len(after):
        return None
    pairs = [(a, b) for a, b in zip(before, after, strict=True) if a != b]
    if not pairs or any(a.co_freevars != b.co_freevars for a, b in pairs):
        return None
    return dict(pairs)


def _functions(code: CodeType) -> Iterator[CodeType]:
    """Of a module or class body, the functions and those of its classes, without what is in them."""
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            if constant.co_flags & inspect.CO_OPTIMIZED:
                yield constant
            else:
                yield from _functions(constant)


class Sweep:
    """A pytest plug-in that, in the place of running the tests, finds the mutants that survive them.

    The copy is at ``root``, the current directory. ``known``: where the first run's results are.
    """

    def __init__(self, mutants: list[Mutant], files: set[str], root: Path, known: Path) -> None:
        self.mutants, self.files, self.root, self.known = mutants, files, root, known
        self.out = os.fdopen(os.dup(1), "w", buffering=1)
        self.log = root / "log.txt"
        self.seconds: dict[str, float] = defaultdict(float)
        self.setup: dict[str, float] = defaultdict(float)  # the longest of a test file
        self.failed: str | None = None
        self.imported: set[tuple[str, int]] = set()  # the lines that ran at import
        self.paths: dict[str, int] = {}  # of tests that run the same lines, the same number
        self.kills: Counter[tuple[str, str]] = Counter()

    # The tests.

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.failed = report.nodeid
        if report.when == "setup":
            file = report.nodeid.partition("::")[0]
            self.setup[file] = max(self.setup[file], report.duration)
        else:
            self.seconds[report.nodeid] += report.duration

    def run(self, tests: list[str]) -> Iterator[str]:
        """Run tests until one fails."""
        for test, following in itertools.pairwise([*tests, None]):
            item, after = self.items[test], self.items.get(following)
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=after)
            yield test
            if self.failed:
                return

    def child(self, work: Callable[[], None], timeout: float) -> int | None:
        """The exit code of a process that does ``work``; None: it did not end."""
        process = os.fork()
        if not process:
            os.setsid()
            log = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(log, 1)
            os.dup2(log, 2)
            code = 1
            try:
                work()
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                os._exit(code)
        handle = os.pidfd_open(process)
        try:
            ended, _, _ = select.select([handle], [], [], timeout)
        finally:
            os.close(handle)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process, signal.SIGKILL)  # and what it has started
            _, status = os.waitpid(process, 0)
        return os.waitstatus_to_exitcode(status) if ended else None

    def note_lines(self, found: set[tuple[str, int]]) -> None:
        """Add the lines of the files that run from here on to ``found``."""
        names = {str(self.root / file): file for file in self.files}

        def line(frame: Any, event: str, argument: Any) -> Any:
            found.add((names[frame.f_code.co_filename], frame.f_lineno))
            return line

        def call(frame: Any, event: str, argument: Any) -> Any:
            return line if frame.f_code.co_filename in names else None

        threading.settrace(call)
        sys.settrace(call)

    def first_run(self) -> None:
        """Run all tests, and note how long each takes and which lines it runs."""
        lines: dict[str, list[tuple[str, int]]] = {}
        now: set[tuple[str, int]] = set()
        self.note_lines(now)
        for test in self.run(list(self.items)):
            lines[test] = sorted(now)
            now.clear()
        sys.settrace(None)
        if self.failed:
            raise SystemExit(f"{self.failed} fails")
        file_of = {test: test.partition("::")[0] for test in lines}
        found = {t: (self.seconds[t] + self.setup[file_of[t]], lines[t]) for t in lines}
        self.known.parent.mkdir(exist_ok=True)
        self.known.write_text(json.dumps(found))

    # The mutants.

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        sys.settrace(None)
        threading.settrace(None)
        begin = time.monotonic()
        self.items = {item.nodeid: item for item in session.items}
        paths = {str(self.root / file) for file in self.files}
        # Of their own type: isinstance would wake lazy attributes of some objects.
        self.functions = [
            f
            for f in gc.get_objects()
            if type(f) is FunctionType and f.__code__.co_filename in paths
        ]
        gc.freeze()
        if not self.known.exists() and self.child(self.first_run, 3600) != 0:
            print(self.log.read_text()[-4000:], file=self.out)
            raise SystemExit("mutations: the tests do not pass on the code as it is")
        self.lines: dict[tuple[str, int], set[str]] = defaultdict(set)
        for test, (seconds, lines) in json.loads(self.known.read_text()).items():
            self.seconds[test] = seconds
            self.paths[test] = hash(str(lines))
            for file, line in lines:
                self.lines[file, line].add(test)
        say = functools.partial(print, file=self.out)
        say(f"{len(self.seconds)} tests pass: {time.monotonic() - begin:.0f} s")
        survivors = 0
        for i, mutant in enumerate(self.mutants, 1):
            if self.survives(mutant):
                survivors += 1
                say(f"survives ({i} of {len(self.mutants)}): {mutant}")
            if i % 50 == 0 or i == len(self.mutants):
                share = f"{survivors} of {i} mutants survive ({survivors / i:.1%})"
                say(f"{share}, {time.monotonic() - begin:.0f} s")
        return True

    def runs_at_import(self, mutant: Mutant) -> bool:
        lines = ((mutant.file, line) for line in mutant.lines)
        return mutant.at_import or not self.imported.isdisjoint(lines)

    def tests_of(self, mutant: Mutant) -> list[str]:
        """The tests that run it, likely killers first, then a quick one for each path."""
        if self.runs_at_import(mutant):
            found = set(self.seconds)
        else:
            found = set().union(*(self.lines[mutant.file, line] for line in mutant.lines))
        last: set[str] = set()
        for file, tests in ELSEWHERE.items():
            apart = {test for test in self.seconds if test.startswith(tests)}
            found = found | apart if file == mutant.file else found - apart
            last |= apart - found
        alike: Counter[int] = Counter()
        key = {}
        for test in sorted(found, key=self.seconds.__getitem__):
            path = self.paths[test]
            key[test] = (-self.kills[mutant.file, test], alike[path], self.seconds[test])
            alike[path] += 1
        return [*sorted(found, key=key.__getitem__), *sorted(last)]

    def survives(self, mutant: Mutant) -> bool:
        """Whether the tests that run it pass."""
        file = self.root / mutant.file
        source = file.read_bytes()
        changed = source[: mutant.start] + mutant.replacement.encode() + source[mutant.end :]
        codes = changed_functions(source, changed, str(file))
        if self.runs_at_import(mutant):
            codes = None
        if codes is not None and not any(f.__code__ in codes for f in self.functions):
            codes = None
        tests = self.tests_of(mutant)
        file.write_bytes(changed)  # for the processes that tests start
        try:
            for begin, end in itertools.pairwise((0, *PARTS)):
                part = _by_file(tests[begin:end])
                killer = self.killer(part, codes) if part else None
                if killer is not None:
                    self.kills[mutant.file, killer] += 1
                    return False
        finally:
            file.write_bytes(source)
        return True

    def killer(self, tests: list[str], codes: dict[CodeType, CodeType] | None) -> str | None:
        """The test that fails, "" if that is not known; None: they pass."""
        failed = self.root / "failed.txt"
        failed.write_text("")

        def work() -> None:
            if codes is None:  # with everything imported anew
                command = [sys.executable, "-m", "pytest", *OPTIONS, *tests]
                raise SystemExit(subprocess.run(command, check=False).returncode)
            for function in self.functions:
                function.__code__ = codes.get(function.__code__, function.__code__)
            for _ in self.run(tests):
                pass
            if self.failed:
                failed.write_text(self.failed)
                raise SystemExit(f"{self.failed} fails")

        timeout = 60 + 5 * sum(map(self.seconds.__getitem__, tests))
        return None if self.child(work, timeout) == 0 else failed.read_text()


def _by_file(tests: list[str]) -> list[str]:
    """In the same order, but a file's tests together, as they share fixtures."""
    files = list(dict.fromkeys(test.partition("::")[0] for test in tests))
    return sorted(tests, key=lambda test: files.index(test.partition("::")[0]))


def digest(root: Path, *more: Any) -> str:
    """Of the code and the tests, and of what is noted of them."""
    found = hashlib.sha256(repr(more).encode())
    for file in sorted(root.rglob("*.py")):
        if file.name != Path(__file__).name:
            found.update(str(file.relative_to(root)).encode() + file.read_bytes())
    return found.hexdigest()[:16]


def _copy(source: str | Path, to: str | Path) -> None:
    if str(source).endswith(".so"):
        os.symlink(Path(source).resolve(), to)
    else:
        shutil.copy2(source, to)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.mutations", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("paths", nargs="+", help="files and folders of fastjac/")
    parser.add_argument("--sample", type=int, help="so many mutants, drawn at random; default: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lines", nargs="*", help="of these lines alone, file:line")
    parser.add_argument(
        "--tests", nargs="*", default=TESTS, help="these alone; default: %(default)s"
    )
    arguments = parser.parse_args()
    project = Path.cwd()
    mutants = [m for path in arguments.paths for m in mutants_of(project, path)]
    files = {m.file for m in mutants}
    print(f"{len(mutants)} mutants of {len(files)} files", flush=True)
    if arguments.lines is not None:
        mutants = [m for m in mutants if f"{m.file}:{m.lines[0]}" in arguments.lines]
    if arguments.sample is not None:
        mutants = random.Random(arguments.seed).sample(mutants, min(arguments.sample, len(mutants)))
    mutants.sort(key=lambda m: (m.file, m.start))
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder).resolve()
        for name in COPIED:
            if (project / name).is_dir():
                ignored = shutil.ignore_patterns("__pycache__")
                shutil.copytree(project / name, root / name, ignore=ignored, copy_function=_copy)
            else:
                _copy(project / name, root / name)
        key = digest(root, sorted(arguments.tests), sorted(files))
        known = project / "build" / f"mutations-{key}.json"
        os.chdir(root)
        sys.path[:] = [str(root), *(p for p in sys.path if p not in ("", str(project)))]
        sys.dont_write_bytecode = True  # a file's bytes change, perhaps within one second
        more = {"PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
        os.environ.update(more)
        sweep = Sweep(mutants, files, root, known)
        sweep.note_lines(sweep.imported)
        code = pytest.main([*OPTIONS, "-s", *arguments.tests], plugins=[sweep])
        os.chdir(project)
    if code != 0:
        raise SystemExit(int(code))


if __name__ == "__main__":
    main()
