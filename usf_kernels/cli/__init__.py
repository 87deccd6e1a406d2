"""The command `usf-kernels`: demo, train, evaluate, calibrate, predict, export, bench, doctor.

Commands import what they need when they run, so that the help and `doctor` work in an installation without
extras. An error that a user can mend is one line on stderr and exit code 2; set USF_KERNELS_DEBUG=1 to see
where it came from.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from usf_kernels import __version__
from usf_kernels.cli import bench, calibrate, demo, doctor, evaluate, export, predict, train
from usf_kernels.memory import keep_freed_memory


def build_parser() -> argparse.ArgumentParser:
    """Make the parser of the whole command line."""
    parser = argparse.ArgumentParser(
        prog="usf-kernels",
        description="Anomaly detection with uniformly scaling flows, and a threshold that can be trusted.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in (
        demo.add_parser,
        train.add_parser,
        evaluate.add_parser,
        calibrate.add_parser,
        predict.add_parser,
        export.add_parser,
        bench.add_parser,
        doctor.add_parser,
    ):
        add(commands)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: the words after the program's name; None takes them from the command line.

    Returns:
        The exit code: 0, 2 for an error, 130 when interrupted, 143 when terminated.
    """
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files need not be UTF-8
    options = build_parser().parse_args(arguments)
    if options.command != "bench":  # which measures programs that do not
        keep_freed_memory()
    debug = os.environ.get("USF_KERNELS_DEBUG", "") not in ("", "0")
    try:
        with _terminating():
            code = options.run(options)
            print(end="", flush=True)  # here, where it may fail
            return code
    except KeyboardInterrupt as interrupt:
        terminated = isinstance(interrupt, Terminated)
        what = "terminated" if terminated else "interrupted"
        print(with_notes(f"usf-kernels: {what}", interrupt), file=sys.stderr)
        return 143 if terminated else 130
    except BrokenPipeError as error:  # as of `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes it at exit, too
        print(with_notes("usf-kernels: error: nobody reads the output any more", error), file=sys.stderr)
        return 2
    except (ValueError, TypeError, OSError, ImportError, RuntimeError, FloatingPointError) as error:
        if debug:
            raise
        print(f"usf-kernels: error: {one_line(error)}", file=sys.stderr)
        return 2


class Terminated(KeyboardInterrupt):
    """Raised by SIGTERM, which schedulers and containers send: a command then ends as with Ctrl-C, and keeps
    what is done so far."""


@contextmanager
def _terminating() -> Iterator[None]:
    """Context in which SIGTERM raises `Terminated`, once: what is written then must not be interrupted again.
    Another handler, or none on purpose, is left as it is."""
    main_thread = threading.current_thread() is threading.main_thread()  # others cannot set handlers
    if not main_thread or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return

    def stop(*_: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise Terminated

    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def with_notes(text: str, error: BaseException) -> str:
    """Add what a command noted on an error to a text, for one line."""
    return ": ".join([text, *getattr(error, "__notes__", ())])


def one_line(error: BaseException) -> str:
    """Describe an error on one line, with the file that it concerns."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__
