"""Files that a failure leaves whole, and folders that one process has for itself."""

import errno
import multiprocessing
import os
import signal
import time
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from clipfast import files
from clipfast.files import locked

FORK = multiprocessing.get_context("fork")


def hold(folder: Path, held: Connection) -> None:
    os.setsid()
    with locked(folder):
        if os.fork() == 0:  # as a data worker: it lives on when its parent is killed
            time.sleep(600)
        held.send("held")
        time.sleep(600)


def test_a_second_one_is_told_who_has_the_folder(tmp_path: Path) -> None:
    with locked(tmp_path):
        expected = rf"in use by process {os.getpid()} on \S+ since \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d \(.*pytest.*\); wait"
        with pytest.raises(BlockingIOError, match=expected) as told, locked(tmp_path):
            pass
        assert "\n" not in str(told.value)
    assert not list(tmp_path.iterdir())
    with locked(tmp_path):
        pass


def test_a_lock_ends_with_its_process_though_its_children_live(tmp_path: Path) -> None:
    held, other = FORK.Pipe(False)
    process = FORK.Process(target=hold, args=(tmp_path, other))
    process.start()
    pid = process.pid
    assert pid is not None and held.recv() == "held"
    try:
        with pytest.raises(BlockingIOError, match=f"in use by process {pid} on "), locked(tmp_path):
            pass
        process.kill()
        process.join()
        os.killpg(pid, 0)  # the child is there
        assert list(tmp_path.iterdir())
        with locked(tmp_path):
            assert (tmp_path / files.LOCK).read_text().startswith(f"process {os.getpid()} ")
        assert not list(tmp_path.iterdir())
    finally:
        os.killpg(pid, signal.SIGKILL)


def count_up(folder: Path, rounds: int) -> None:
    """Add to a number in a file, in a way that loses what two add at once."""
    while rounds:
        try:
            with locked(folder):
                number = folder / "number"
                before = int(number.read_text())
                time.sleep(0.0005)
                number.write_text(str(before + 1))
            rounds -= 1
        except BlockingIOError:
            time.sleep(0.0002)


def test_two_never_have_it_at_once(tmp_path: Path) -> None:
    """Though each removes the file at its end."""
    (tmp_path / "number").write_text("0")
    processes = [FORK.Process(target=count_up, args=(tmp_path, 100), daemon=True) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert (tmp_path / "number").read_text() == "400"


@pytest.mark.parametrize("how", ["no module", errno.EOPNOTSUPP, errno.ENOLCK, errno.ENOSYS])
def test_where_there_are_no_locks_it_says_so_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog, how: str | int
) -> None:
    """Of NFS without its lock daemon, of FUSE and of others: each has its own error."""

    def flock(descriptor: int, _: int) -> None:
        raise OSError(how, os.strerror(int(how)))

    if how == "no module":
        monkeypatch.setattr(files, "fcntl", None)
    else:
        monkeypatch.setattr(files.fcntl, "flock", flock)
    for _ in range(3):
        with locked(tmp_path):
            pass
    (told,) = caplog.messages
    assert told.startswith(f"no lock at {tmp_path}") and "\n" not in told
    assert told.endswith("; take care that no other process writes to this folder")
    assert how == "no module" or os.strerror(int(how)) in told
