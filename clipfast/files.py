"""What is written so that a failure leaves nothing half done, and what others wrote, read."""

from __future__ import annotations

import errno
import functools
import json
import logging
import os
import re
import shutil
import socket
import stat
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None  # type: ignore[assignment]

log = logging.getLogger(__name__)
LOCK = ".clipfast.lock"
ITSELF = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)  # opens no link, and waits at no pipe
_held: set[int] = set()  # descriptors of this process's locks


@contextmanager
def output_folder(path: str | Path) -> Iterator[Path]:
    """A folder to write to, made if need be, and gone again when nothing was written."""
    folder = Path(path)
    if not os.fspath(path):
        raise ValueError("expected a folder to write to, got an empty name; . is the one you are in")
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
    if Path(path).exists() and not Path(path).is_file():  # a device would be replaced by the file, /dev/null for everybody
        raise OSError(errno.EINVAL, f"expected the name of a file to write, got a folder or a device at {path}; choose another")
    remove(aside)  # a link would be written through, a pipe waits for a reader
    try:
        with open(aside, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except BaseException:
        with suppress(OSError):
            aside.unlink()
        raise


def remove(path: Path) -> None:
    """A file, a folder and all that is in it, or a link, not what it leads to; what cannot be removed stays."""
    with suppress(OSError):
        path.unlink() if path.is_symlink() or not path.is_dir() else shutil.rmtree(path, ignore_errors=True)


@contextmanager
def locked(folder: str | Path) -> Iterator[None]:
    """The folder for this process alone; BlockingIOError tells who else has it. The lock ends with the process in any case.
    ValueError: its file is none of ours.

    What a killed process leaves is a file that says who it was, and that the next one takes over.
    """
    path = Path(folder, LOCK)
    owner, descriptor = os.getpid(), None
    try:
        descriptor = _take(path)
    except (BlockingIOError, FileNotFoundError):
        raise
    except OSError as error:
        _say_once(f"no lock at {path}: {error}; take care that no other process writes to this folder")
    try:
        yield
    finally:
        if descriptor is not None and os.getpid() == owner:  # a forked child has no part in it
            with suppress(OSError):
                path.unlink()  # first: whoever opened it before takes it for gone, as `_take` sees
            _held.discard(descriptor)
            os.close(descriptor)


def _take(path: Path) -> int:
    """The descriptor that holds the lock; OSError where the system has no locks."""
    if fcntl is None:
        raise OSError("this system has no flock")
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | ITSELF, 0o666)
        except OSError as error:
            if path.is_symlink() or path.is_dir():
                raise ValueError(_not_ours(path)) from error
            raise
        try:
            about = os.fstat(descriptor)
            if not stat.S_ISREG(about.st_mode) or about.st_nlink > 1:  # who we are would be written into another file
                raise ValueError(_not_ours(path))
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(path, descriptor):
                break
            os.close(descriptor)  # removed by the one who had it before: once more
        except BlockingIOError as error:
            told = " ".join(os.pread(descriptor, 1000, 0).decode(errors="replace").split()) or "another process"
            os.close(descriptor)
            raise BlockingIOError(
                f"expected {path.parent} for this process alone, got one that is in use by {told}; wait until it has ended, "
                "or choose another folder"
            ) from error
        except (OSError, ValueError):
            os.close(descriptor)
            raise
    _held.add(descriptor)
    with suppress(OSError):  # of a full disk: the lock holds without
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, _who().encode(errors="replace"), 0)
    return descriptor


def _not_ours(path: Path) -> str:
    return f"expected the lock's own file at {path}, got a link, a folder or a device; remove it, or choose another folder"


def _is_at(path: Path, descriptor: int) -> bool:
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    return False


def _who() -> str:
    command = " ".join(sys.argv)
    command = command if len(command) <= 200 else f"{command[:200]}..."
    return f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')} ({command})\n"


@functools.cache
def _say_once(told: str) -> None:
    log.warning(told)


def _let_go() -> None:
    """In a forked child, which would hold the lock when its parent has been killed."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)
# ---- JSON and TOML that anybody may have written

# A key of a hundred parts: a table in a table for each, for which the parser takes time and memory by the square.
_LONG_KEY = re.compile(r"""(?:(?:[\w-]+|"[^"\n]*"|'[^'\n]*')[ \t]*\.[ \t]*){100}""")
LARGEST = 64 << 20  # bytes of a configuration: as values it takes up to thirty times that


def parsed(text: str | bytes, where: object, kind: type = dict, form: str = "JSON") -> Any:
    """The object (or list, by `kind`) that a text of JSON or TOML holds; ValueError in one line where it holds none."""
    expected = f"{where}: expected a {form} {'list' if kind is list else 'object' if form == 'JSON' else 'file'}"
    try:
        text = text.decode("utf-8") if isinstance(text, bytes) else text
        if form == "TOML" and _LONG_KEY.search(text):
            raise RecursionError
        value = json.loads(text) if form == "JSON" else tomllib.loads(text)
    except RecursionError:
        raise ValueError(f"{expected}, got one that is nested too deeply; mend it, or fetch it again") from None
    except ValueError as error:
        raise ValueError(f"{expected}, got {first_line(error)}; mend it, or fetch it again") from error
    if not isinstance(value, kind):
        raise ValueError(f"{expected}, got {type(value).__name__}; mend it, or fetch it again")
    return value


def read_parsed(path: str | Path, kind: type = dict, form: str = "JSON") -> Any:
    """`parsed` of a file; OSError where it cannot be read."""
    if Path(path).is_fifo():  # it would wait for a writer
        raise OSError(errno.EINVAL, f"expected a file, got a pipe at {path}")
    with open(path, "rb") as file:
        if len(text := file.read(LARGEST + 1)) > LARGEST:
            raise ValueError(f"{path}: expected {form} of at most {LARGEST >> 20} MB, got more; is it another file?")
    return parsed(text, path, kind, form)


def shown(text: object) -> str:
    """A text in which nothing steers the terminal: line breaks, escapes and what turns the direction are spelt out.

    Not what joins an emoji of several.
    """
    return "".join(own if own.isprintable() or own == "\u200d" else ascii(own)[1:-1] for own in str(text))


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
