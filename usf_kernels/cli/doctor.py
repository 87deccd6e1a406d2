"""`usf-kernels doctor`: report what is installed and which code each operation runs."""

from __future__ import annotations

import argparse
import json
from typing import Any


def add_parser(commands: Any) -> None:
    """Declare `doctor`."""
    parser = commands.add_parser(
        "doctor",
        help="say what is installed and which code each operation runs",
        description="Say which device, Triton, extension and extras there are, and what runs each operation.",
    )
    parser.add_argument("--json", action="store_true", help="print JSON, for a bug report")
    parser.set_defaults(run=doctor)


def doctor(options: argparse.Namespace) -> int:
    """Print the report; returns the exit code."""
    from usf_kernels.doctor import diagnose, format_report

    report = diagnose()
    print(json.dumps(report, indent=2) if options.json else format_report(report))
    return 0
