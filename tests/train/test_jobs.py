"""Training jobs of several processes: the gradients of one process, the same run after a kill, and an end with a reason."""

from __future__ import annotations

import functools
import json
import math
import os
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from clipfast.data import Batch
from clipfast.files import locked
from clipfast.model import CLIP
from clipfast.train import TrainConfig, checkpoint, train
from clipfast.train.engine import Objective, Towers, backward, split
from clipfast.train.job import Job, exchange, full, spread
from tests.data.test_data import write_shards
from tests.train.test_train import RESNET, SIZES, checkpointed, dense_loss, log, pairs, tiny

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
# Towers of one narrow block, 3.5 ms a pair one by one and 0.7 by sevens: each process takes its share of the cases of one rank.
SMALL = SIZES | {"image_resolution": 16, "embed_dim": 16, "vision_layers": 1, "vision_width": 32, "vision_heads": 1}
SMALL |= {"vision_patch_size": 8, "transformer_layers": 1, "transformer_width": 32}
CASES = [  # (pairs, ranks, micro-batch (0: whole), how, dtype)
    *((448, size, micro, "ddp", dtype) for dtype in ("fp64", "fp32") for size in (1, 2, 4) for micro in (1, 7, 64, 0)),
    *((448, size, micro, "fsdp", dtype) for dtype in ("fp64", "fp32") for size in (2, 4) for micro in (7, 0)),
]
LARGE = [(4096, size, micro, "ddp", dtype) for dtype in ("fp64", "fp32") for size in (1, 2, 4) for micro in (1, 7, 64, 0)]
DTYPES = {"fp64": torch.float64, "fp32": torch.float32}


def narrow_pairs(rows: int, step: int = 0) -> Batch:
    """`rows` pairs, some of them with the same label."""
    return pairs(step, rows, side=16)._replace(labels=torch.arange(rows) % (rows - 5))


def share(batch: Batch, rank: int, size: int) -> Batch:
    """A rank's rows of a batch."""
    return split(batch, size)[rank]


def case_model(dtype: torch.dtype, rows_before: int = 0) -> CLIP:
    """A model whose images lose half of their four patches: a row's are the same ones however the batch is split, as they are
    drawn row by row, and a rank's generator stands where its rows begin."""
    model = tiny(SMALL).to(dtype)
    model.visual.patch_dropout = 0.5
    torch.manual_seed(1)
    torch.rand(rows_before, 4)
    return model


def case_gradients(case: tuple, rank: int, group: Any) -> dict[str, Tensor]:
    rows, size, micro, how, dtype = case
    model = case_model(DTYPES[dtype], rank * rows // size)
    job = Job(rank, size, CPU, group, group, None) if size > 1 else Job(0, 1, CPU)
    towers, objective = Towers(model), Objective(model, group=job.group)
    blocks = [*model.visual.transformer.resblocks, *model.transformer.resblocks]
    wrapped = spread(towers, blocks, list(objective.parameters()), how, job)
    batch = share(narrow_pairs(rows), rank, size)
    batch = batch._replace(pixels=batch.pixels.to(DTYPES[dtype]))
    parts = -(-rows // size // micro) if micro else 1
    loss = backward(towers, objective, split(batch, parts), wrapped)
    job.mean([p.grad for p in objective.parameters() if p.grad is not None])
    found = {name: full(p.grad) for name, p in model.named_parameters() if p.grad is not None}
    return found | {"loss": torch.tensor(loss, dtype=torch.float64)}


def run_config(out: str, **changes: Any) -> TrainConfig:
    quick: dict[str, Any] = {"model": SIZES, "steps": 8, "lr": 1e-3, "tensorboard": False, "progress": False, "device": "cpu"}
    # A large epsilon: the keys' biases have no gradient but rounding, and Adam would make steps of full size of that.
    return TrainConfig(**(quick | {"out": out, "batch_size": 16, "eps": 1e-3} | changes))


def shares(rank: int, size: int) -> Any:
    """The batches of 16 pairs that every number of ranks shares out."""
    return lambda step: (share(pairs(s, 16), rank, size) for s in count(step))


RUNS: dict[str, dict[str, Any]] = {
    "ddp": {"micro_batch": 3, "ema": 0.9, "grad_clip": 0.5},
    "fsdp": {"micro_batch": 3, "ema": 0.9, "grad_clip": 0.5, "parallel": "fsdp"},
    "siglip": {"loss": "siglip", "micro_batch": 3},
    "siglip fsdp": {"loss": "siglip", "parallel": "fsdp"},
    "locked": {"lock_image": True, "micro_batch": 2},
    "locked fsdp": {"lock_text": True, "micro_batch": 2, "parallel": "fsdp"},
    "words": {"objective": "words", "micro_batch": 3},
    "caption fsdp": {"objective": "caption", "micro_batch": 3, "parallel": "fsdp"},
    "bag": {"objective": "bag", "micro_batch": 3},
    "bf16": {"precision": "bf16", "micro_batch": 4},
    "bf16 fsdp": {"precision": "bf16", "micro_batch": 4, "parallel": "fsdp"},
}
FP16 = {"precision": "fp16", "micro_batch": 4, "parallel": "fsdp", "grad_clip": 0.5, "steps": 12}


def whole_run(name: str, out: str, rank: int, size: int) -> dict[str, Tensor]:
    done = train(run_config(f"{out}/{name} {size}", **(FP16 if name == "fp16" else RUNS[name])), shares(rank, size))
    return dict((done.ema or done.model).state_dict())


def curve(out: str, rank: int, size: int) -> None:
    """Twenty steps with 4,096 pairs, five batches again and again; what it leaves is its log."""
    batches = [share(narrow_pairs(4096, step), rank, size) for step in range(5)]
    config = run_config(f"{out}/curve {size}", model=SMALL | {"vision_patch_size": 16}, batch_size=4096, steps=20)
    train(config, lambda step: (batches[s % 5] for s in count(step)))


def job(rank: int, folder: str, cases: list[tuple], runs: bool) -> None:
    """What one of four processes does; it leaves what it found in a file."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", 4), rank=rank, world_size=4)
    groups = {size: dist.new_group(range(size)) for size in (2, 4)}
    found: dict[str, Any] = {}
    alone, together = ([case for case in cases if (case[1] == 1) == one] for one in (True, False))
    # The last process takes the longest of its own, beside the first two's cases of two ranks.
    for case in [*alone[3 - rank :: 4], *(case for case in together if rank < case[1])]:
        own = case_gradients(case, rank % case[1], groups.get(case[1]))
        if rank == case[1] - 1 or case[1] == 1:  # the last one's, for the first could have done all by itself
            found["-".join(map(str, case))] = own
    if runs:
        curve(folder, rank, 4)
        for name in (*RUNS, "fp16"):
            found[name] = whole_run(name, folder, rank, 4)
        found["resnet"] = resnet_statistics(rank, folder)
        found["errors"] = errors(rank, folder)
    torch.save(found, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def resnet_statistics(rank: int, folder: str) -> dict[str, Tensor]:
    done = train(run_config(f"{folder}/resnet", model=RESNET, steps=2), shares(rank, 4))
    return {name: buffer for name, buffer in done.model.named_buffers() if buffer.is_floating_point()}


def errors(rank: int, folder: str) -> list[str]:
    """Of a batch that cannot be shared, and of a validation that fails on one rank."""

    def validate(model: CLIP, job: Job) -> dict[str, float]:
        job.gather(ValueError("one bad picture") if job.rank == 2 else 0)
        return {}

    found = []
    for out, changes in (("uneven", {"batch_size": 6}), ("validation", {"val_every": 2})):
        try:
            train(run_config(f"{folder}/{out}", **changes), shares(rank, 4), validate=validate)
        except ValueError as error:
            found.append(str(error))

    def no_room(path: Path) -> list[int]:
        raise OSError("no room")

    if rank == 0:  # what it alone writes, when the others have written theirs
        fingerprint, checkpoint.fingerprint = checkpoint.fingerprint, no_room
    try:
        train(run_config(f"{folder}/full", steps=1, parallel="fsdp"), shares(rank, 4))
    except (OSError, ValueError) as error:
        found.append(str(error))
    if rank == 0:
        checkpoint.fingerprint = fingerprint

    taken = Path(folder, "taken")
    taken.mkdir(exist_ok=True)
    with locked(taken) if rank == 0 else nullcontext():
        try:
            train(run_config(str(taken)), shares(rank, 4))
        except (OSError, ValueError) as error:
            found.append(str(error))
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where four processes, started once for all tests, left what they found."""
    folder = tmp_path_factory.mktemp("jobs")
    mp.spawn(job, (str(folder), CASES, True), 4)
    return folder


@pytest.fixture(scope="module")
def found(folder: Path) -> list[dict[str, Any]]:
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(4)]


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("large")
    mp.spawn(job, (str(folder), LARGE, False), 4)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(4)]


@functools.cache
def truth(rows: int) -> dict[str, Tensor]:
    """The whole batch in one piece in fp64 with the loss written out."""
    model, batch = case_model(torch.float64), narrow_pairs(rows)
    image, text = model.encode_image(batch.pixels.double()), model.encode_text(batch.tokens, lengths=batch.lengths)
    loss = dense_loss(image, text, model.logit_scale.exp(), batch.labels)
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None} | {"loss": loss.detach()}


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_the_gradient_of_any_split_is_that_of_the_whole(found: list[dict], case: tuple) -> None:
    is_that_of_the_whole(found, case)


@pytest.mark.slow
@pytest.mark.parametrize("case", LARGE, ids=lambda case: "-".join(map(str, case)))
def test_the_gradient_of_any_split_of_4096_pairs_is_that_of_the_whole(large: list[dict], case: tuple) -> None:
    is_that_of_the_whole(large, case)


def is_that_of_the_whole(found: list[dict], case: tuple) -> None:
    rows, _, _, _, dtype = case
    name = "-".join(map(str, case))
    got, expected = next(own[name] for own in found if name in own), truth(rows)
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert value.norm() > 0, name
        error = (got[name].double() - value).norm() / value.norm()
        assert error <= (1e-10 if dtype == "fp64" else 2e-5), f"{name}: {error:.1e}"


def test_four_ranks_of_1024_pairs_follow_the_curve_of_one_of_4096(found: list[dict], folder: Path) -> None:
    curve(str(folder), 0, 1)
    ours, theirs = ([line["loss"] for line in log(folder / f"curve {size}")] for size in (4, 1))
    assert ours == pytest.approx(theirs, rel=1e-5) and len(ours) == 20
    assert ours[-1] < math.log(4096) - 0.5 < ours[0]  # they learn: below what guessing gives


@pytest.mark.parametrize("name", RUNS)
def test_four_ranks_train_as_one(found: list[dict], folder: Path, name: str) -> None:
    alone = whole_run(name, str(folder), 0, 1)
    rough = "bf16" in name
    for got in found:
        for key, value in alone.items():
            torch.testing.assert_close(
                got[name][key], value, atol=2e-3 if rough else 2e-6, rtol=0.05 if rough else 1e-4, msg=key
            )
        assert all(torch.equal(got[name][key], found[0][name][key]) for key in alone)
    ours, theirs = ([line["loss"] for line in log(folder / f"{name} {size}")] for size in (4, 1))
    assert ours == pytest.approx(theirs, rel=2e-2 if rough else 1e-5) and len(ours) == 8
    frozen = {"locked": "visual.", "locked fsdp": "transformer."}.get(name)
    if frozen:
        start = tiny().state_dict()
        assert all(torch.equal(alone[key], start[key]) == key.startswith(frozen) for key in alone if "resblocks" in key)


def test_a_gradient_beyond_fp16_in_one_ranks_part_is_left_out_by_all(found: list[dict], folder: Path) -> None:
    lines = log(folder / "fp16 4")
    finite = [math.isfinite(line["gradient_norm"]) for line in lines]
    assert not finite[0] and finite[-1]  # the scaler begins at 65,536, which is too much here
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.5
    for got in found:
        assert all(torch.equal(value, found[0]["fp16"][key]) for key, value in got["fp16"].items())


def test_a_checkpoint_of_fsdp_goes_on_alone_and_the_other_way(found: list[dict], folder: Path, tmp_path: Path) -> None:
    for name in ("fsdp", "siglip fsdp"):
        many, one = (checkpointed(folder / f"{name} {size}", 8) for size in (4, 1))
        assert {key for key in many if not key.startswith("rng.")} == {key for key in one if not key.startswith("rng.")}
        assert {key for key in many if key.startswith("rng.")} == {f"rng.{rank}.cpu" for rank in range(4)}
        for key, value in one.items():
            if not key.startswith("rng."):
                torch.testing.assert_close(many[key], value, atol=3e-6, rtol=1e-3, msg=key)
        straight = train(run_config(str(tmp_path / f"{name} straight"), **RUNS[name] | {"steps": 12}), shares(0, 1))
        at_eight = run_config(str(folder / f"{name} 4"), **RUNS[name] | {"steps": 12, "resume": "auto"})
        done = train(at_eight, shares(0, 1))
        assert done.steps == 12
        ours, theirs = (
            [line["loss"] for line in log(out)[8:]] for out in (folder / f"{name} 4", tmp_path / f"{name} straight")
        )
        assert len(ours) == 4 and ours != theirs  # the schedule's end was another
        assert ours == pytest.approx(theirs, rel=0.2)
        assert straight.steps == 12


def test_the_statistics_of_batch_norm_are_the_mean_of_the_ranks(found: list[dict]) -> None:
    for name, value in found[0]["resnet"].items():
        assert all(torch.equal(got["resnet"][name], value) for got in found), name


def test_what_is_wrong_is_said_on_every_rank(found: list[dict]) -> None:
    for rank, got in enumerate(found):
        uneven, validation, full, taken = got["errors"]
        assert taken.startswith("rank 0: " if rank else "expected ") and "in use by process" in taken
        assert full.endswith("CHECKPOINT NOT SAVED at step_00000001: no room; the one before it stays")
        assert uneven == "expected a batch_size that the 4 ranks can share evenly, got 6: take a multiple"
        assert validation == ("one bad picture" if rank == 2 else "rank 2: one bad picture")


# ---- jobs under torchrun -----------------------------------------------------------------------------------------------------

SCRIPT = """
import os, signal, sys, time
from itertools import count
import torch
torch.set_num_threads(1)
from tests.train.test_jobs import run_config, shares
from clipfast.train.job import place
from clipfast.train import train

HUNG = -1
rank, size = place()
out, kills, changes = sys.argv[1], dict(eval(sys.argv[2])), eval(sys.argv[3])

def on_step(step, model, metrics):
    number = kills.get((rank, step))
    if number == HUNG:
        time.sleep(600)
    if number and not os.path.exists(f"{out}/{rank} {step}"):  # once: what is started again goes on
        open(f"{out}/{rank} {step}", "w").close()
        os.kill(os.getpid(), number)

done = train(run_config(out, resume="auto", **changes), shares(rank, size), on_step=on_step)
print(f"rank {rank}: {done.steps} steps, {done.stopped or 'finished'}", flush=True)
"""


def start(out: Path, kills: dict, size: int, options: list[str], **changes: Any) -> subprocess.Popen:
    out.mkdir(exist_ok=True)
    (out / "script.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}", *options]
    arguments = [
        str(out / "script.py"),
        str(out),
        repr([(where, int(number)) for where, number in kills.items()]),
        repr(changes),
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*command, *arguments], env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def test_sixty_steps_killed_twice_are_sixty_steps_at_a_stretch(tmp_path: Path) -> None:
    settings = {"steps": 60, "checkpoint_every": 5, "ema": 0.9, "micro_batch": 3, "patch_dropout": 0.5}
    straight = start(tmp_path / "straight", {}, 2, [], **settings)
    killed = start(tmp_path / "killed", {(1, 17): signal.SIGKILL, (0, 41): signal.SIGKILL}, 2, ["--max-restarts=2"], **settings)
    said = [job.communicate(timeout=600)[0] for job in (straight, killed)]
    assert straight.returncode == killed.returncode == 0, said
    assert "rank 1: 60 steps, finished" in said[1]
    assert "exitcode: -9" in said[1] or "exitcode  : -9" in said[1] or "Signal 9" in said[1]
    assert (tmp_path / "killed" / "1 17").exists() and (tmp_path / "killed" / "0 41").exists()
    ours, theirs = (checkpointed(tmp_path / name, 60) for name in ("killed", "straight"))
    assert ours.keys() == theirs.keys() and len(ours) > 100
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name
    ours, theirs = ([line["loss"] for line in log(tmp_path / name)] for name in ("killed", "straight"))
    assert ours == theirs and len(ours) == 60


def test_a_signal_to_one_rank_saves_and_ends_all_with_exit_code_0(tmp_path: Path) -> None:
    job = start(tmp_path / "run", {(1, 6): signal.SIGUSR1}, 2, [], steps=30)
    said = job.communicate(timeout=300)[0]
    assert job.returncode == 0, said
    assert "rank 0: 7 steps" in said and "rank 1: 7 steps, SIGUSR1" in said
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_00000007"]


def test_a_signal_to_torchrun_saves_though_it_reaches_the_readers_too(tmp_path: Path) -> None:
    """The agent signals the process groups of its ranks, in which are the workers that read the next batch."""
    data, out = write_shards(tmp_path / "data"), tmp_path / "run"
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "clipfast.cli", "train", data]
    sizes = json.dumps(SIZES | {"vocab_size": 49408, "context_length": 77})
    options = ["--model", sizes, "--steps", "100000", "--batch-size", "4", "--workers", "1", "--device", "cpu"]
    job = subprocess.Popen(
        [sys.executable, "-m", *torchrun, *options, "--out", str(out), "--no-tensorboard", "--no-progress"],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 300
        while not (out / "log.jsonl").exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        job.terminate()
        said = job.communicate(timeout=300)[0]
    finally:
        job.kill()
    assert "stopped by SIGTERM: go on with --resume auto" in said, said
    assert [path.name for path in (out / "checkpoints").iterdir()] == [f"step_{len(log(out)):08}"]


@pytest.mark.parametrize(("number", "timeout"), [(signal.SIGKILL, 60.0), (-1, 4.0)], ids=["dead", "hung"])
def test_a_lost_rank_ends_the_job_with_its_name(tmp_path: Path, number: int, timeout: float) -> None:
    """Without torchrun's agent: the others notice by themselves, by the closed connection or after the time-out."""
    out = tmp_path / "run"
    out.mkdir()
    (out / "script.py").write_text(SCRIPT)
    jobs = []
    for rank in range(3):
        place = {"RANK": rank, "WORLD_SIZE": 3, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(out)}
        environment = os.environ | {k: str(v) for k, v in place.items()} | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        changes = repr({"steps": 1000, "timeout": timeout, "batch_size": 12})
        command = [sys.executable, str(out / "script.py"), str(out), repr([((1, 5), int(number))]), changes]
        jobs.append(subprocess.Popen(command, env=environment, cwd=ROOT, stderr=subprocess.PIPE, text=True))
    said = jobs[0].communicate(timeout=300)[1]
    jobs[2].communicate(timeout=300)
    jobs[1].kill()
    jobs[1].communicate()
    assert jobs[0].returncode and jobs[2].returncode
    last = said.strip().splitlines()[-1]
    assert "rank 0 of 3 lost" in last and "1" in last.partition("lost")[2].partition("first sign")[0], said


def free_port(folder: Path) -> int:
    """A port that nobody listens on, the same for all who ask with that folder."""
    import socket

    file = folder / "port"
    if not file.exists():
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            file.write_text(str(probe.getsockname()[1]))
    return int(file.read_text())


def test_nothing_waits_for_a_job_of_one() -> None:
    job = Job(0, 1, CPU)
    assert (job.most(1.0, 2.0), job.share("a"), job.gather(3)) == ([1.0, 2.0], "a", [3])
    towers = Towers(tiny())
    assert spread(towers, [], [], "fsdp", job) is towers
    exchange(towers, False)


# ---- killed ------------------------------------------------------------------------------------------------------------------


def killed(folder: Path, *arguments: int) -> int:
    """How many runs were killed at operations of checkpoints, model.pt, logs and config; all ended as the one that was not."""
    command = [sys.executable, "-m", "tests.train.forks", str(folder), *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr[-2000:]
    kills, wrong = json.loads(done.stdout)
    assert not wrong, wrong
    return kills


def test_killed_at_some_of_its_file_operations_a_run_is_bitwise_the_one_that_was_not(tmp_path: Path) -> None:
    assert killed(tmp_path, 1, 0, 30, 11) >= 2  # one rank, rank 0, every 30th operation from the 11th on


@pytest.mark.slow
@pytest.mark.parametrize(("world", "victim", "step", "least"), [(1, 0, 1, 60), (2, 0, 2, 30), (2, 1, 1, 5)])
def test_killed_at_each_of_its_file_operations(tmp_path: Path, world: int, victim: int, step: int, least: int) -> None:
    assert killed(tmp_path, world, victim, step) >= least
