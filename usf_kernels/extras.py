"""Packages that not every user needs: imported where they are used, and named where they are missing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def needs_extra(name: str, purpose: str) -> Iterator[None]:
    """Context in which a failed import raises an ImportError that names the extra to install.

    Args:
        name: of the extra in pyproject.toml.
        purpose: what needs them, for the message.
    """
    try:
        yield
    except ImportError as error:
        raise ImportError(f"{purpose}: {error}: pip install 'usf-kernels[{name}]'") from error
