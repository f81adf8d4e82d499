"""The processes of a training job: torchrun's environment, the groups in which they talk, and signals to stop."""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

ROLL_CALL = timedelta(seconds=10)  # for the living to say so once a rank is lost; the torchrun agent gives them 30 s to end


def place() -> tuple[int, int]:
    """(rank, number of ranks) of this process, as its process group or torchrun has it; (0, 1) without either."""
    if dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    told = [os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")]
    if not all(own.isascii() and own.isdecimal() for own in told) or not int(told[0]) < int(told[1]):
        raise ValueError(f"expected RANK below WORLD_SIZE, as torchrun sets them, got {told[0]!r} and {told[1]!r}; unset them")
    return int(told[0]), int(told[1])


@dataclass
class Job:
    """This process among those that train one model. The groups are None where it is alone."""

    rank: int
    world: int
    device: torch.device
    group: dist.ProcessGroup | None = None  # features and gradients
    control: dist.ProcessGroup | None = None  # gloo, the main thread's: what all must agree on
    saving: dist.ProcessGroup | None = None  # gloo, for the thread that writes checkpoints beside the training

    def most(self, *values: float) -> list[float]:
        """The largest of each value over the ranks."""
        if self.control is None:
            return list(values)
        found = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(found, dist.ReduceOp.MAX, group=self.control)
        return found.tolist()

    def share(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        if self.control is None:
            return value
        box = [value]
        dist.broadcast_object_list(box, group_src=0, group=self.control)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, on every rank. An exception among them is raised everywhere: no rank waits for another."""
        if self.control is None:
            found = [value]
        else:
            found = [None] * self.world
            dist.all_gather_object(found, value, group=self.control)
        for rank, given in enumerate(found):
            if isinstance(given, Exception):
                raise value if rank == self.rank else ValueError(f"rank {rank}: {given}")
        return found

    def mean(self, tensors: Sequence[Tensor]) -> None:
        """The mean over the ranks, in place."""
        if self.group is None or not tensors:
            return
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(flat, group=self.group)
        flat /= self.world  # gloo knows no AVG
        for tensor, mean in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(mean.view_as(tensor))

    def lost(self, error: Exception) -> RuntimeError:
        """What to raise for an error of communication: it names the ranks that no longer answer."""
        assert self.control is not None
        try:
            dist.monitored_barrier(self.control, ROLL_CALL, wait_all_ranks=True)
            names = "a connection"
        except RuntimeError as named:  # rank 0's says which ranks did not come, the others' that rank 0 did not
            names = str(named).splitlines()[0]
        return RuntimeError(f"rank {self.rank} of {self.world} lost {names}; first sign: {str(error).splitlines()[0]}")


ALONE = Job(0, 1, torch.device("cpu"))


def peak_memory(device: torch.device) -> int:
    """The most bytes so far: of tensors on a GPU, of the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def keep_memory() -> None:
    """Make glibc keep freed memory for the next step. By default it hands large blocks back to the system at each free, and
    the system zeroes them again at the next use: in the demo's step, 2,200 to 12,200 page faults and 3 to 23 ms of 60 to 77;
    kept, 1,700 and 3 to 4, for a peak that is no higher (1,257 MB and 1,260)."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:  # glibc's
        if not mallopt(-3, 1 << 30):  # M_MMAP_THRESHOLD: from this size on a block is mapped by itself
            mallopt(-3, 1 << 25)  # the most that glibc before 2.35 takes
        mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD: how much may lie free at the end of the heap


@contextmanager
def joined(device: str = "auto", timeout: float = 600.0) -> Iterator[Job]:
    """The job of this process: alone, in a process group that is there already, or in torchrun's, which it makes and ends.

    device: cpu, cuda, ... or auto (a GPU where there is one); under torchrun each local rank takes its own GPU.
    timeout: seconds after which a rank that does not answer is given up, and the job with it.
    """
    kind = torch.device(device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
    rank, world = place()
    if kind.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"expected a device of this machine, got {device}, but torch {torch.__version__} finds no GPU; take cpu"
        )
    if kind.type == "cuda" and kind.index is None and world > 1:
        kind = torch.device("cuda", int(os.environ.get("LOCAL_RANK", rank % torch.cuda.device_count())))
    if kind.type == "cuda":
        torch.cuda.set_device(kind)
    if kind.type == "cpu":
        keep_memory()
    if world == 1:
        yield Job(0, 1, kind)
        return
    ours = not dist.is_initialized()
    if ours:
        backend = "cpu:gloo,cuda:nccl" if kind.type == "cuda" else "gloo"
        store, _, _ = next(dist.rendezvous("env://", timeout=timedelta(seconds=timeout)))
        # Of a job that torchrun has started again: the store still holds the addresses of the processes before.
        store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout), store=store, rank=rank, world_size=world)
    groups = [dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout)) for _ in range(2)]
    job = Job(rank, world, kind, dist.group.WORLD, *groups)
    try:
        yield job
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and not any(word in str(error) for word in ("gloo", "NCCL")):
            raise
        raise job.lost(error) from error
    finally:
        if ours:
            dist.destroy_process_group()


def spread(
    towers: nn.Module, blocks: Sequence[nn.Module], scalars: Sequence[nn.Parameter], how: str, job: Job, dtype: Any = None
) -> Any:
    """`towers` over the ranks: "ddp" copies them to each, "fsdp" gives each rank its part of every block's weights.

    scalars: parameters that stay outside, for `Job.mean`: the loss uses them, not the towers.
    dtype: what FSDP gathers the weights in; None for their own.
    """
    if job.group is None:
        return towers
    for tensor in [*towers.parameters(), *towers.buffers(), *scalars]:
        dist.broadcast(tensor.data, group_src=0, group=job.group)
    if how == "fsdp":
        # FSDP takes no weights in another order, which a ResNet's have.
        towers.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        # Of blocks that return a view: nothing here writes in place.
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor", UserWarning)
        mesh = DeviceMesh.from_group(job.group, job.device.type)
        options: Any = {"mesh": mesh, "mp_policy": MixedPrecisionPolicy(dtype, torch.float32 if dtype else None)}
        for block in blocks:
            fully_shard(block, **options)
        return fully_shard(towers, ignored_params=set(scalars), **options)
    inner = {id(p) for p in scalars}
    outside = [name for name, p in towers.named_parameters() if id(p) in inner]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(towers, outside)
    ids = [job.device] if job.device.type == "cuda" else None
    return DistributedDataParallel(towers, ids, process_group=job.group, gradient_as_bucket_view=True)


def exchange(wrapped: Any, now: bool) -> None:
    """Whether the ranks exchange gradients in the next backward pass through what `spread` gave."""
    if isinstance(wrapped, DistributedDataParallel):
        wrapped.require_backward_grad_sync = now
    elif isinstance(wrapped, FSDPModule):
        wrapped.set_requires_gradient_sync(now)


def alike(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """FSDP's parts and whole tensors apart: no operation on a list takes both."""
    sides: list[list[Tensor]] = [[t for t in tensors if isinstance(t, DTensor) == parts] for parts in (True, False)]
    return [side for side in sides if side]


def full(tensor: Tensor) -> Tensor:
    """The whole of a tensor, gathered where FSDP has it in parts: every rank must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class Stop:
    """The signal that asked this process to save and end, once there was one."""

    name = ""

    def __call__(self, number: int, frame: Any) -> None:
        self.name = signal.Signals(number).name


@contextmanager
def stop_signals() -> Iterator[Stop]:
    """SIGTERM and SIGUSR1 (what schedulers send before the time is up) set the flag in place of ending the process.

    torchrun passes SIGTERM on to its ranks, which then end with 0, and ends itself with 1; SIGUSR1 it passes on where told to
    (`--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1`), and else dies of it.
    """
    stop, before = Stop(), {}
    if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handlers
        before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
