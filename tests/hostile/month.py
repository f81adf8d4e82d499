"""`python -m tests.hostile.month CHECKPOINTS|trials SECONDS`: what a month does to a training, in minutes.

Each trial is a process of its own, and ends well, its result as it should be, or with exit code 2 and a line that says what to
do: thousands of checkpoints, a disk that is full and has room again, a clock that jumps, 64 file descriptors, a /dev/shm of
1 MB, a shard that vanishes. Disks of their own need root: elsewhere those trials are left out, and told.
"""

from __future__ import annotations

import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch

from clipfast import load
from clipfast.cli import main as clipfast
from clipfast.train import train
from clipfast.weights.distributed import verify
from tests.data.test_data import write_shards
from tests.train.test_train import SIZES, config, endless, log

CHECKPOINTS = 3000
SECONDS = 180  # within which a trial answers, beside the time that the checkpoints are given


def left(out: Path, steps: int, kept: int = 3, every: int = 1) -> str:
    """What is wrong with what a run of so many steps has left."""
    found = sorted(path.name for path in (out / "checkpoints").iterdir())
    wanted = [f"step_{step:08}" for step in range(steps - (kept - 1) * every, steps + 1, every)]
    if found != wanted:
        return f"expected {wanted}, found {found[:6]}"
    for name in found:
        verify(out / "checkpoints" / name)
    load(out / "model.pt", "cpu")
    if [line["step"] for line in log(out)] != [*range(1, steps + 1)]:
        return "the log lacks steps"
    odd = [str(path) for path in out.rglob("*") if path.name.endswith(".part") or path.name.startswith(".clipfast")]
    return f"left {odd}" if odd else ""


def checkpoints(folder: Path, number: int, seconds: float) -> str:
    """One at every step; when the time is up, the run is told to end."""
    before, counts, end = len(os.listdir("/proc/self/fd")), [], time.monotonic() + seconds

    def count(step: int, *_: object) -> None:
        if step % 50 == 0:
            counts.append((len(os.listdir(folder / "run" / "checkpoints")), len(os.listdir("/proc/self/fd")) - before))
        if time.monotonic() > end:
            os.kill(os.getpid(), signal.SIGTERM)

    one = SIZES | {"vision_layers": 1, "transformer_layers": 1}  # it is the saving that is tried
    done = train(config(folder / "run", model=one, steps=number, checkpoint_every=1, keep_last=3), endless, on_step=count)
    print(f"{done.steps:,} checkpoints{'' if done.steps == number else ' (cut short)'}")
    if any(folders > 5 or files > 20 for folders, files in counts):
        return f"folders and open files grew: {counts[-5:]}"
    return left(folder / "run", done.steps)


def full_disk(folder: Path, number: int, seconds: float) -> str:
    """Of 16 MB, where a checkpoint takes 2.5: now and then another file takes all that is left."""
    _mount(folder, "16M")
    ballast, missed = folder / "ballast", []

    def crowd(step: int, *_: object) -> None:
        if step % 20 == 5:
            with open(ballast, "wb") as file:
                try:
                    while True:
                        file.write(bytes(1 << 16))
                        file.flush()
                except OSError:
                    missed.append(step)
        if step % 20 == 15:
            ballast.unlink()

    train(config(folder / "run", steps=60, checkpoint_every=1, keep_last=2), endless, on_step=crowd)
    if len(missed) != 3:
        return f"the disk was full {len(missed)} times, expected 3"
    whole = sorted((folder / "run" / "checkpoints").iterdir())
    for path in whole:
        verify(path)
    load(folder / "run" / "model.pt", "cpu")
    names = [path.name for path in whole]
    return "" if names == ["step_00000059", "step_00000060"] else f"expected the last two checkpoints, found {names}"


def clock(folder: Path, number: int, seconds: float) -> str:
    """The time of day goes back a year, on ten, and stands."""
    real, rng = time.time, random.Random(0)
    time.time = lambda: rng.choice((real(), real() - 3e7, real() + 3e8, 0.0))
    try:
        train(config(folder / "run", steps=40, checkpoint_every=2, keep_last=20, tensorboard=True), endless)
    finally:
        time.time = real
    found = [line["seconds"] for line in log(folder / "run")]
    return "" if found == sorted(found) and 0 < found[-1] < 200 else f"the seconds of the log jumped: {found[-3:]}"


def _command(folder: Path, *more: str) -> int:
    sizes = '{"embed_dim": 8, "image_resolution": 32, "vision_layers": 1, "vision_width": 64, "vision_patch_size": 16, '
    sizes += (
        '"context_length": 77, "vocab_size": 49408, "transformer_width": 64, "transformer_heads": 1, "transformer_layers": 1}'
    )
    given = ["--model", sizes, "--out", str(folder / "run"), "--batch-size", "8", "--device", "cpu", "--no-progress"]
    return clipfast(["train", str(folder / "s"), *given, "--steps", "40", "--checkpoint-every", "2", "--keep-last", "2", *more])


def few_files(folder: Path, number: int, seconds: float) -> str:
    """64 file descriptors, of which a process of Python has some already."""
    write_shards(folder / "s", shards=4, each=8)
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
    return _ended(_command(folder, "--workers", "2"), folder)


def little_shared_memory(folder: Path, number: int, seconds: float) -> str:
    _mount(Path("/dev/shm"), "1M")
    write_shards(folder / "s", shards=4, each=80)
    return _ended(_command(folder, "--workers", "2", "--batch-size", "256", "--steps", "4"), folder, 4)


def vanished(folder: Path, number: int, seconds: float) -> str:
    """One shard of four is gone while the run reads; then all are."""
    write_shards(folder / "s", shards=4, each=8)
    threading.Thread(target=_remove, args=(folder,), daemon=True).start()
    return _ended(_command(folder, "--workers", "2", "--steps", "400"), folder, 400)


def _remove(folder: Path) -> None:
    for shard, lines in (("000.tar", 50), ("001.tar", 100), ("002.tar", 100), ("003.tar", 100)):
        while not (folder / "run" / "log.jsonl").exists() or len(log(folder / "run")) < lines:
            time.sleep(0.02)
        (folder / "s" / shard).unlink()


def _ended(code: int, folder: Path, steps: int = 40) -> str:
    if code == 2:  # its line is on stderr
        raise SystemExit(2)
    return left(folder / "run", steps, 2, 2) if code == 0 else f"exit code {code}"


def _mount(place: Path, size: str) -> None:
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)], capture_output=True, text=True)
    if done.returncode:
        raise PermissionError(f"no disk of its own: {done.stderr.strip()}")


TRIALS: dict[str, Callable[[Path, int, float], str]] = {
    trial.__name__: trial for trial in (full_disk, clock, few_files, little_shared_memory, vanished, checkpoints)
}
MOUNTS = ("full_disk", "little_shared_memory")


def report(which: str, seconds: float) -> int:
    """Run so many checkpoints, or the other trials, and print a line for each; how many went wrong."""
    wrong, end, number = 0, time.monotonic() + seconds, int(which) if which.isdecimal() else 0
    for name in TRIALS:
        if (name == "checkpoints") != bool(number):
            continue
        begun = time.monotonic()
        if begun > end:
            print(f"month           {name}: not begun, the time is up", flush=True)
            continue
        unshared = ["unshare", "-m"] if name in MOUNTS else []
        # Not in a folder that the trial covers by a disk of its own.
        with tempfile.TemporaryDirectory(prefix="clipfast-", dir="/tmp" if name in MOUNTS else None) as folder:
            seconds = max(5.0, end - begun - 20)  # for imports and the end
            command = [*unshared, sys.executable, "-m", "tests.hostile.month", name, folder, str(number), str(seconds)]
            try:
                done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS + seconds)
                code, out, err = done.returncode, done.stdout.strip(), done.stderr
            except (subprocess.TimeoutExpired, OSError) as error:
                code, out, err = -1, "", str(error)
        told = next((line for line in err.splitlines()[::-1] if "error:" in line or "Error" in line), "")
        absent = "no disk of its own" in err or "unshare" in told
        state = "left out" if absent else "ended well" if code == 0 else "told what to do" if code == 2 else "WRONG"
        wrong += state == "WRONG"
        line = f"{out.splitlines()[-1] if name == 'checkpoints' and out else name}: {state}; {time.monotonic() - begun:.0f} s"
        print(f"month           {line}{f'; {(told or err[-1500:])[:700]}' if code else ''}", flush=True)
    return wrong


def _trial(name: str, folder: str, number: int, seconds: float) -> int:
    torch.set_num_threads(1)
    what = TRIALS[name](Path(folder), number, seconds)
    if what:
        print(f"WRONG error: {what}", file=sys.stderr)
    return 3 if what else 0


if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1] in TRIALS:
        sys.exit(_trial(sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4])))
    sys.exit(report(sys.argv[1], float(sys.argv[2])))
