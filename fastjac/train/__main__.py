"""``python -m fastjac.train [demo|teacher|student|table|evaluate] [options]``.

Exit status: 0; 1 if the training failed, or the system (a file, a device, memory); 2 for bad input;
130 if interrupted. Each of the last three comes with one line on the standard error. Any other
exception is a bug, and is shown whole.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from pkgutil import resolve_name

from fastjac.errors import FastjacError, TrainingFailed, first_line, unknown
from fastjac.train import ranks
from fastjac.train.options import (
    DemoOptions,
    EvaluateOptions,
    StudentOptions,
    TableOptions,
    TeacherOptions,
)
from fastjac.train.sources import check_sources

USAGE = """usage: python -m fastjac.train [COMMAND] [OPTIONS]

commands (COMMAND --help tells the options):
  demo      a teacher, a hundred students, a table and a report (the default)
  teacher   train a network
  student   train a network with the help of a teacher
  table     students by several methods, on few images per class, over seeds
  evaluate  score a trained network

torchrun --nproc-per-node N -m fastjac.train teacher|student|evaluate trains or scores on N processes.

On the CPU the process keeps the memory it has had from the system (glibc's mallopt), up to its
peak: mapping it anew at every step costs more than the arithmetic."""


# By command: its options, and the function that does it. PyTorch comes with the latter, in seconds:
# it is imported once the command line is known to be right.
COMMANDS: dict[str, tuple[type, str]] = {
    "demo": (DemoOptions, "fastjac.train.table:tabulate"),
    "teacher": (TeacherOptions, "fastjac.train.commands:train"),
    "student": (StudentOptions, "fastjac.train.commands:train"),
    "table": (TableOptions, "fastjac.train.table:tabulate"),
    "evaluate": (EvaluateOptions, "fastjac.train.commands:score"),
}


def run(argv: Sequence[str]) -> str:
    """Do what the command line says; the line that reports it."""
    from fastjac.train.parse import parse

    command, rest = ("demo", argv) if not argv or argv[0].startswith("-") else (argv[0], argv[1:])
    ranks.check_environment()
    if command not in COMMANDS:
        raise unknown("command", command, COMMANDS)
    options_class, function = COMMANDS[command]
    table = options_class in (TableOptions, DemoOptions)
    if table and ranks.launched():
        raise FastjacError(
            f"{command} does not run under torchrun: its runs are independent; expected --jobs, and on "
            "several machines the same command on each, with one --output that they share"
        )
    options = parse(command, options_class, rest)
    check_sources(options)
    do = resolve_name(function)
    return (
        do(options, shlex.join(["python", "-m", "fastjac.train", *argv])) if table else do(options)
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run; report on the standard output, or say in one line what was wrong; the exit status."""
    argv = sys.argv[1:] if argv is None else list(argv)
    help_asked = argv[:1] in (["-h"], ["--help"])
    return report(lambda: USAGE if help_asked else run(argv))


def report(work: Callable[[], str]) -> int:
    """Do ``work``, and report what it gives, or say in one line what was wrong; the exit status."""
    _open_closed()
    try:
        line = work()
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "fastjac":
            raise
        return _say(
            FastjacError(
                f"the trainer needs the package {error.name}, which is not installed; its packages come "
                "with: pip install --no-build-isolation '.[train]'"
            ),
            2,
        )
    except SystemExit:  # a command's --help, printed and maybe not yet written
        return _tell("")
    except TrainingFailed as error:
        return _say(error, 1)
    except FastjacError as error:
        return _say(error, 2)
    except (MemoryError, RuntimeError, OSError) as error:
        if not (said := _of_the_system(error)):
            raise
        return _say(RuntimeError(said), 1)
    except KeyboardInterrupt as stop:
        return _say(stop, 130)
    return _tell(line + "\n") if ranks.is_first() else 0


def _of_the_system(error: Exception) -> str:
    """What went wrong with memory, a process or a file; empty of an error that is a bug."""
    from fastjac.train.batches import LOST_LOADER, lost_loader  # with PyTorch, mostly there by now
    from fastjac.train.step import is_out_of_memory

    if isinstance(error, OSError):
        return first_line(error)
    if lost_loader(error):
        return f"{LOST_LOADER}: {first_line(error)}"
    if isinstance(error, MemoryError) or is_out_of_memory(error):
        return f"out of memory: {first_line(error)}"
    return ""


def _open_closed() -> None:
    """Give the process the outputs that it was started without (``2>&-``), with nothing behind them.

    Else the files that it opens next would take their numbers, and what libraries write there.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115


def _tell(text: str) -> int:
    """Write to the standard output; the exit status."""
    try:
        coding = sys.stdout.encoding or "utf-8"
        sys.stdout.write(text.encode(coding, "backslashreplace").decode(coding))
        sys.stdout.flush()
    except OSError as error:
        # What could not be written would be tried again, in vain, when the interpreter ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        reason = error.strerror or str(error)
        said = f": {' '.join(text.split())}" if text.count("\n") == 1 else ""
        return _say(OSError(f"the standard output cannot be written to: {reason}{said}"), 1)
    return 0


def _say(error: BaseException, status: int) -> int:
    if not ranks.fails_first():
        return status
    text = str(error).strip() or "interrupted"
    # A loader's worker process sends its error after a traceback: the last line is the news.
    if "DataLoader worker process" in text:
        text = text.splitlines()[-1].removeprefix("fastjac.errors.FastjacError: ")
    with contextlib.suppress(OSError):  # the status says it too
        print("fastjac: " + "\\n".join(text.splitlines()), file=sys.stderr)
    return status


def _again_if_lost(lost: sys.UnraisableHookArgs) -> None:
    """Send Ctrl-C again that came within a callback or a destructor, where Python drops exceptions."""
    if lost.exc_type is not KeyboardInterrupt:
        sys.__unraisablehook__(lost)
        return
    _pressed.clear()
    timer = threading.Timer(0.01, os.kill, (os.getpid(), signal.SIGINT))
    timer.daemon = True
    timer.start()


_pressed: list[float] = []


def _on_ctrl_c(*_: object) -> None:
    """The first ends the run in order, one right after it is the same, the third ends the process."""
    _pressed.append(time.monotonic())
    if len(_pressed) > 2:
        os._exit(130)
    if len(_pressed) == 1 or _pressed[1] - _pressed[0] > 2:
        raise KeyboardInterrupt


def _watch_ctrl_c() -> None:
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not ignored, as by nohup
        signal.signal(signal.SIGINT, _on_ctrl_c)
        sys.unraisablehook = _again_if_lost


if __name__ == "__main__":
    _watch_ctrl_c()
    # Of images that it reads all the same: a broken date in their EXIF data, say.
    warnings.filterwarnings("ignore", module="PIL", append=True)
    status = main()
    if ranks.launched():  # the process group's threads may abort the interpreter's end
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)
