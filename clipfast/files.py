"""What is written so that a failure leaves nothing half done."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO


@contextmanager
def output_folder(path: str | Path) -> Iterator[Path]:
    """A folder to write to, made if need be, and gone again when nothing was written."""
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(13, "no write permission")
    except OSError as error:
        raise type(error)(
            f"expected a folder that can be written at {folder}, got: {error.strerror}; choose another"
        ) from error
    try:
        yield folder
    finally:
        with suppress(OSError):
            folder.rmdir()


@contextmanager
def replacing(path: str | Path) -> Iterator[IO[bytes]]:
    """A file to write that takes the place of `path` when all of it is on the disk, or is gone when writing fails."""
    aside = Path(f"{path}.part")
    try:
        with open(aside, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except BaseException:
        with suppress(OSError):
            aside.unlink()
        raise
