"""Files that are either written whole or not at all."""

from __future__ import annotations

import csv
import errno
import glob
import io
import json
import math
import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO


@contextmanager
def atomic_write(path: str | Path, *, durable: bool = True) -> Iterator[BinaryIO]:
    """Open a binary file that takes the place of `path` only once it is complete.

    The bytes go to a hidden temporary file in the same folder, which `os.replace` moves over `path` when the
    block ends, and which is removed when the block raises: a reader sees the old file or the new one, even
    if several write at once. An existing file is replaced whatever it is: links are not followed, and its
    mode is not kept.

    Args:
        path: the file to write; its folder must exist.
        durable: wait until the bytes are on the disk, so that the file survives a power failure too. Without
            it the file still survives the death of the process at any moment.

    Raises:
        OSError: naming `path`, when there is no space, no permission or no folder, or it is a device or pipe.
    """
    path = Path(path)
    _check_kind(path)
    temporary = path.with_name(f"{_hidden(path.name)}{secrets.token_hex(8)}.tmp")
    try:
        try:
            with open(temporary, "xb") as file:
                yield file
                file.flush()
                if durable:
                    os.fsync(file.fileno())
            os.replace(temporary, path)
        except OSError as error:
            if error.filename not in (None, str(temporary)):
                raise
            # A failed write names no file, the temporary name would not help, and NumPy gives no number.
            number = error.errno or errno.EIO
            raise OSError(number, error.strerror or str(error), str(path)) from error
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def _check_kind(path: Path) -> None:
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise OSError(errno.EINVAL, "Not a regular file", str(path))


def _hidden(name: str) -> str:
    """Return the start of the temporary files for a name, cut so that it is valid for the longest names."""
    return f".{os.fsdecode(os.fsencode(name)[:160])}."


def make_folder(path: str | Path) -> None:
    """Make a folder and its parents, unless it exists already.

    Raises:
        OSError: naming what is in the way, or the folder if it exists and takes no files.
    """
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "Not a folder", str(path))
    path.mkdir(parents=True, exist_ok=True)
    check_writable(path / "any")


def check_writable(path: str | Path) -> None:
    """Raise before the work is done what `atomic_write` would raise after it.

    Raises:
        OSError: naming the file, if it is a folder, device or pipe; naming its folder, if that is missing or
            takes no files.
    """
    path = Path(path)
    _check_kind(path)
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "Is a folder", str(path))
    if not path.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "No such folder", str(path.parent))
    if not os.access(path.parent, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path.parent))


def remove_leftovers(folder: str | Path, names: Sequence[str]) -> None:
    """Remove the temporary files that killed processes left in a folder while writing these files."""
    for name in names:
        for leftover in Path(folder).glob(f"{glob.escape(_hidden(name))}*.tmp"):
            with suppress(OSError):
                leftover.unlink()


# Names of files need not be UTF-8. What this makes of them is an escape in JSON, and reads as the same name.
UNDECODED = "backslashreplace"


def write_json(path: str | Path, value: Any) -> None:
    """Write a value as indented JSON, atomically; NaN and infinities, which JSON lacks, become null."""
    text = json.dumps(_finite(value), indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    with atomic_write(path) as file:
        file.write(text.encode(errors=UNDECODED))


def write_csv(path: str | Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows with equal keys as CSV with a header line, atomically; an empty file for no rows."""
    text = io.StringIO()
    if rows:
        writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    with atomic_write(path) as file:
        file.write(text.getvalue().encode(errors=UNDECODED))


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
