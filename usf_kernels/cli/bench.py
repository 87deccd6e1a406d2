"""`usf-kernels bench`: the benchmark of a source checkout."""

from __future__ import annotations

import argparse
import importlib
import math
import sys
from pathlib import Path
from typing import Any

from usf_kernels.cli.options import nonempty_path, positive


def add_parser(commands: Any) -> None:
    """Declare `bench`."""
    parser = commands.add_parser(
        "bench",
        help="measure speed against FrEIA, anomalib, scikit-image, Higra and plain PyTorch",
        description="Check and time every operation, block and model beside its peers, in one process. "
        "Runs in a checkout of the source.",
    )
    add_arguments(parser)
    parser.set_defaults(run=bench)


def minutes(text: str) -> float:
    """Parse a time of 0 or more."""
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number of at least 0, not {text}")
    return value


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options, which `python -m bench.run` has too."""
    parser.add_argument("subjects", nargs="*", metavar="SUBJECT", help="what to measure; all by default")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, auto (default: %(default)s)")
    parser.add_argument(
        "--threads", type=positive, help="of torch on the CPU (default: one per core that may be used)"
    )
    parser.add_argument(
        "--quick", action="store_true", help="small inputs, nothing that compiles; rows only with --output"
    )
    parser.add_argument(
        "--providers",
        nargs="+",
        metavar="WORD",
        help="only those whose name contains one of these; their rows are kept only with --output",
    )
    parser.add_argument("--cases", default="", metavar="WORD", help="only cases whose name contains this")
    parser.add_argument("--cold", action="store_true", help="empty the caches before every call")
    parser.add_argument(
        "--minutes", type=minutes, default=0.0, help="start no further case after this time; 0 for no limit"
    )
    parser.add_argument(
        "--output",
        type=nonempty_path,
        help="CSV in which the measured cases replace those it has (default: bench/results/<device>.csv)",
    )


def bench(options: argparse.Namespace) -> int:
    """Run the benchmark; returns 0.

    Raises:
        ImportError: in an installation without the source, which has no benchmark.
    """
    root = Path(__file__).parents[2]
    if not (root / "bench" / "run.py").is_file():
        raise ImportError("the benchmark is not part of the installed package: run it in a source checkout")
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    return importlib.import_module("bench.run").run(options)
