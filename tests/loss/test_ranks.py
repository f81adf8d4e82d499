"""The contrastive losses over 1 to 8 gloo processes against one process with the whole batch, and against open_clip's."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from bench.rivals import open_clip
from clipfast.loss import ClipLoss, SigLipLoss, clip_loss, ranks, siglip_loss
from tests.loss.test_loss import Margin, Shifted, features, subclass

WORLD, D = 8, 24
EVEN, UNEVEN = [6] * WORLD, [5, 0, 9, 1, 7, 3, 8, 2]
DTYPES = {"fp32": torch.float32, "fp64": torch.float64, "bf16": torch.bfloat16}
CASES = [
    (size, loss, counts, labelled, dtype)
    for size in range(1, WORLD + 1)
    for loss in ("clip", "siglip")
    for counts in ("even", "uneven")
    for labelled in (False, True)
    for dtype in (("fp32", "fp64", "bf16") if size in (2, 5) else ("fp32",))
]
WRONG = {
    "D": dict(text=(2, D - 8), image=(2, D - 8)),
    "dtype": dict(dtype=torch.float64),
    "device": dict(device="meta"),
    "texts": dict(text=(3, D)),
    "labels": dict(labels=torch.arange(2)),
    "integers": dict(dtype=torch.int32),
    "a list of labels": dict(labels=[0, 1]),
    "8 bits": dict(dtype=torch.float8_e5m2),
    "locked": dict(locked=True),
}


def batch(counts: list[int], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """The whole batch in fp64 rounded to ``dtype``, and labels of which some occur twice, on different ranks too."""
    N = sum(counts)
    return *features(N, D, dtype), torch.arange(N) % max(1, N - 4)


def gradients(
    loss: str, image: Tensor, text: Tensor, labels: Tensor | None, group: Any = None, /, **fixed: bool
) -> dict[str, Tensor]:
    """The loss and its gradients; ``fixed`` names the arguments that ask for none."""
    given = dict(image=image, text=text, scale=torch.tensor(20.0, dtype=torch.float64))
    if loss == "siglip":
        given["bias"] = torch.tensor(-4.0, dtype=torch.float64)
    leaves = {k: v.detach().clone().requires_grad_(k not in fixed) for k, v in given.items()}
    value = (clip_loss if loss == "clip" else siglip_loss)(*leaves.values(), labels=labels, group=group)
    wanted = {k: v for k, v in leaves.items() if v.requires_grad}
    return {"loss": value.detach()} | dict(zip(wanted, torch.autograd.grad(value, list(wanted.values())), strict=True))


def job(rank: int, folder: str) -> None:
    """What one of the processes does; it leaves what it found in a file."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", ".*makes the matrix of all logits|.*all_gather is deprecated")  # the latter: open_clip's
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", WORLD), rank=rank, world_size=WORLD)
    groups = {size: dist.new_group(range(size)) for size in range(1, WORLD + 1)}
    found: dict[str, Any] = {}
    for case in CASES:
        size, loss, counts, labelled, dtype = case
        if rank < size:
            rows = {"even": EVEN, "uneven": UNEVEN}[counts][:size]
            ranks.PART_BYTES = 4 * size * D * DTYPES[dtype].itemsize  # four rows of every rank: two and three parts
            own = [x.split(rows)[rank] for x in batch(rows, DTYPES[dtype])]
            found["-".join(map(str, case))] = gradients(loss, *own[:2], own[2] if labelled else None, groups[size])
    for size, part in ((3, twice), (3, wrong), (4, traffic), (4, through_ddp), (WORLD, against_open_clip), (WORLD, subclasses)):
        if rank < size:
            found[part.__name__] = part(rank, groups[size])
    torch.save(found, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
    if rank < 2:
        dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/two", 2), rank=rank, world_size=2)
        torch.save(flags(rank), f"{folder}/flags {rank}.pt")
        dist.barrier()
        dist.destroy_process_group()


def traffic(rank: int, group: Any) -> dict[str, list[int]]:
    """Bytes that a rank sends forward and backward: of a ring, which is the least, in each collective as it is called."""
    sent: list[int] = []
    shares: dict[str, Any] = dict(
        all_gather=lambda out, own: out.nbytes - own.nbytes,
        reduce_scatter=lambda out, whole: whole.nbytes - out.nbytes,
        all_reduce=lambda x, by: 2 * x.nbytes,
    )
    real = {name: getattr(ranks, name) for name in shares}
    for name in shares:

        def counted(*args: Any, name: str = name, **options: Any) -> Any:
            sent.append(shares[name](*args))
            return real[name](*args, **options)

        setattr(ranks, name, counted)
    found = {}
    image, text, _ = (x.split(EVEN[:4])[rank] for x in batch(EVEN[:4], torch.bfloat16))
    for loss in (clip_loss, siglip_loss):
        for wanted in (False, True):
            sent.clear()
            leaves = [x.detach().clone().requires_grad_(wanted) for x in (image, text)]
            value = loss(*leaves, *((10.0,) if loss is clip_loss else (10.0, -3.0)), group=group)
            forward = sum(sent)
            if wanted:
                value.backward()
            found[f"{loss.__name__}{' with gradients' * wanted}"] = [forward, sum(sent) - forward]
    for name, function in real.items():
        setattr(ranks, name, function)
    return found


def twice(rank: int, group: Any) -> bool:
    """Equal inputs give equal bits; and a gradient that is not asked for changes none of the others."""
    own = [x.split(UNEVEN[:3])[rank] for x in batch(UNEVEN[:3], torch.float32)]
    equal = []
    for loss in ("clip", "siglip"):
        once, again = (gradients(loss, *own, group) for _ in range(2))
        locked, only = gradients(loss, *own, group, image=True), gradients(loss, *own, group, image=True, text=True)
        equal += [torch.equal(once[k], again[k]) for k in once]
        equal += [torch.equal(once[k], locked[k]) for k in locked if k != "scale"]
        equal += [torch.allclose(once["scale"], x["scale"]) for x in (only,)]
    return all(equal)


def wrong(rank: int, group: Any) -> dict[str, str]:
    """The error of this rank when rank 1 passes something else than the others."""
    errors = {}
    for name, change in WRONG.items():
        given = dict(image=(2, D), text=(2, D), dtype=torch.float32, device="cpu", labels=None, locked=False)
        given |= change if rank == 1 else {}
        image, text = (torch.ones(given[k], dtype=given["dtype"], device=given["device"]) for k in ("image", "text"))
        if text.is_floating_point():
            text.requires_grad_(not given["locked"])
        try:
            clip_loss(image, text, 1.0, labels=given["labels"], group=group)
            errors[name] = "none"
        except (TypeError, ValueError) as error:
            errors[name] = f"{type(error).__name__}: {error}"
    return errors


def against_open_clip(rank: int, group: Any) -> dict[str, list[Tensor]]:
    """Gradients of ours and of open_clip's modules, both divided by the world size as DDP would, and both losses' mean."""
    image, text, _ = (x.split(EVEN)[rank] for x in batch(EVEN, torch.float64))
    told = dict(rank=rank, world_size=WORLD)
    pairs = {
        "clip": (ClipLoss(local_loss=True, gather_with_grad=True, **told), open_clip.loss.ClipLoss(True, True, **told)),
        "siglip": (SigLipLoss(dist_impl="bidir", **told), open_clip.loss.SigLipLoss(dist_impl="bidir", **told)),
    }
    found: dict[str, list[Tensor]] = {}
    for name, modules in pairs.items():
        for module in modules:
            leaves = [x.detach().clone().requires_grad_() for x in (image, text, torch.tensor(9.0), torch.tensor(-3.0))]
            value = module(*leaves[:3], logit_bias=leaves[3] if name == "siglip" else None)
            value.backward()
            made = [value.detach().clone(), *(x.grad for x in leaves if x.grad is not None)]
            for x in made[:1] + made[3:]:
                dist.all_reduce(x)
            found.setdefault(name, []).append([x / WORLD for x in made])
    return found


def subclasses(rank: int, group: Any) -> dict[str, Any]:
    """Losses and gradients of one subclass of each module and of open_clip's, and the error where a rank brings fewer rows."""
    image, text, _ = (x.split(EVEN)[rank] for x in batch(EVEN, torch.float64))
    told, found = dict(rank=rank, world_size=WORLD), {}
    clip = [dict(local_loss=local, gather_with_grad=grad) for local in (False, True) for grad in (False, True)]
    ours, theirs = (ClipLoss, SigLipLoss), (open_clip.loss.ClipLoss, open_clip.loss.SigLipLoss)
    for kind, (mixin, options) in enumerate(((Margin, clip), (Shifted, [dict(), dict(chunk_size=4)]))):
        for option in options:
            made = []
            for base, extra in ((ours[kind], option), (theirs[kind], {k: v for k, v in option.items() if k != "chunk_size"})):
                leaves = [x.detach().clone().requires_grad_() for x in (image, text, torch.tensor(9.0), torch.tensor(-3.0))]
                value = subclass(mixin, base, **told, **extra)(*leaves)
                value.backward()
                made.append([value.detach().clone(), *(x.grad for x in leaves)])
            found[f"{mixin.__name__} {option}"] = made
        try:
            subclass(mixin, ours[kind], **told)(image[rank == 1 :], text[rank == 1 :], 9.0, -3.0)
        except ValueError as error:
            found[f"uneven {mixin.__name__}"] = str(error)
    return found


FLAGS = {"default": {}, "local_loss": dict(local_loss=True), "both": dict(local_loss=True, gather_with_grad=True)}


def flags(rank: int) -> dict[str, list[Tensor]]:
    """The mean over 2 ranks, as DDP takes it, of the gradients in a tower's weights and in the scale: open_clip's, ours."""
    inputs = [x.split([32, 32])[rank] for x in features(64, D, torch.float64)]
    found = {}
    for base in (open_clip.loss.ClipLoss, ClipLoss):
        for name, options in FLAGS.items():
            towers = linear_towers()
            image, text, scale = towers(*inputs)
            base(rank=rank, world_size=2, **options)(F.normalize(image), F.normalize(text), scale).backward()
            grads = [towers.image.weight.grad, towers.text.weight.grad, towers.scale.grad]
            for grad in grads:
                dist.all_reduce(grad)
            found[f"{base.__module__.partition('.')[0]} {name}"] = [grad / 2 for grad in grads]
    return found


def through_ddp(rank: int, group: Any) -> list[Tensor]:
    """Parameter gradients of two linear towers under DDP."""
    towers = DistributedDataParallel(linear_towers(), process_group=group)
    image, text, labels = (x.split(UNEVEN[:4])[rank] for x in batch(UNEVEN[:4], torch.float64))
    images, texts, scale = towers(image, text)
    clip_loss(images, texts, scale, normalize=True, labels=labels, group=group).backward()
    return [p.grad for p in towers.parameters()]


class linear_towers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.image, self.text = nn.Linear(D, 16, dtype=torch.float64), nn.Linear(D, 16, dtype=torch.float64)
        self.scale = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.image(image), self.text(text), self.scale.exp()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the processes leave what they found: one start for all tests, since importing torch eight times takes long."""
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(job, (str(folder),), WORLD)
    return folder


@pytest.fixture(scope="module")
def found(folder: Path) -> list[dict[str, Any]]:
    """What every rank found."""
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(WORLD)]


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_many_ranks_equal_one(found: list[dict], case: tuple) -> None:
    size, loss, counts, labelled, dtype = case
    rows = {"even": EVEN, "uneven": UNEVEN}[counts][:size]
    image, text, labels = batch(rows, DTYPES[dtype])
    labels = labels if labelled else None
    one = gradients(loss, image, text, labels)
    truth = gradients(loss, image.double(), text.double(), labels)
    got = [found[rank]["-".join(map(str, case))] for rank in range(size)]
    unit = {"fp32": 1e-6, "fp64": 1e-13, "bf16": 1e-6}[dtype]
    for each in got:
        assert (each["loss"] - one["loss"]).abs() <= unit * one["loss"].abs()
    for name in one.keys() - {"loss"}:
        of_ranks = [each[name] / size for each in got]  # what DDP's mean leaves
        joined = sum(of_ranks) if one[name].ndim == 0 else torch.cat(of_ranks)
        error, alone = (joined - truth[name]).double().norm(), (one[name] - truth[name]).double().norm()
        assert error <= 3 * alone + 10 * unit * truth[name].norm(), name


def test_every_byte_is_sent_once(found: list[dict]) -> None:
    size, N = 4, sum(EVEN[:4])
    small = 2 * 4 * 3 * N + size * ranks.CARD + 64  # statistics of N columns to and fro, the cards, the loss
    for rank in range(size):
        sent = found[rank]["traffic"]
        for loss in ("clip_loss", "siglip_loss"):
            forward, backward = sent[loss]
            assert N * D * 2 * 3 // 4 <= forward <= N * D * 2 + small and backward == 0
            forward, backward = sent[f"{loss} with gradients"]
            assert backward <= N * D * 4 and forward + backward <= N * D * (2 + 4) + small
            assert forward + backward >= N * D * 6 * 3 // 4  # the count is not empty


def test_equal_bits_and_no_more_gradients_than_asked(found: list[dict]) -> None:
    assert all(found[rank]["twice"] for rank in range(3))


@pytest.mark.parametrize("name", WRONG)
def test_a_rank_that_differs_is_an_error_on_all(found: list[dict], name: str) -> None:
    errors = [found[rank]["wrong"][name] for rank in range(3)]
    assert all(e.startswith(("ValueError", "TypeError")) for e in errors)
    for e in (errors[0], errors[2]):
        assert "expected the same on every rank" in e and "on rank 1" in e and "on rank 0, 2" in e


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_equals_open_clip_over_ranks(found: list[dict], name: str) -> None:
    for rank in range(WORLD):
        ours, theirs = found[rank]["against_open_clip"][name]
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


def test_ddp_gives_the_gradients_of_one_process(found: list[dict]) -> None:
    towers = linear_towers()
    image, text, labels = batch(UNEVEN[:4], torch.float64)
    images, texts, scale = towers(image, text)
    clip_loss(images, texts, scale, normalize=True, labels=labels).backward()
    for rank in range(4):
        for got, parameter in zip(found[rank]["through_ddp"], towers.parameters(), strict=True):
            torch.testing.assert_close(got, parameter.grad, rtol=1e-9, atol=1e-13)


def test_subclasses_equal_open_clips_over_ranks(found: list[dict]) -> None:
    for rank in range(WORLD):
        each = found[rank]["subclasses"]
        for name in [name for name in each if not name.startswith("uneven")]:
            for a, b in zip(*each[name], strict=True):
                torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9, msg=name)
        for mixin in (Margin, Shifted):
            assert "expected the same on every rank" in each[f"uneven {mixin.__name__}"]


def test_the_gradient_is_whole_where_open_clips_flags_give_a_part(found: list[dict], folder: Path) -> None:
    """Of the true gradient in a tower's weights, on 2 ranks with DDP's mean: open_clip's default flags give 1/2 exactly (each
    rank lets it through its own rows only), ``local_loss`` alone 0.42 of its length in another direction, cosine 0.84 (of this
    batch: it hangs on the features), ``local_loss`` with ``gather_with_grad`` the whole; ours the whole whatever the flags say.
    In the scale all give the whole. So who changes the import from open_clip's defaults doubles the step of SGD in the towers
    (on N ranks: N times)."""
    towers = linear_towers()
    image, text, scale = towers(*features(64, D, torch.float64))
    clip_loss(image, text, scale, normalize=True).backward()
    image, text, scale = (x.grad for x in (towers.image.weight, towers.text.weight, towers.scale))
    whole = [(1.0, 1.0)] * 3
    expected = {f"{home} {name}": whole for home in ("open_clip", "clipfast") for name in FLAGS}
    expected["open_clip default"] = [(0.5, 1.0), (0.5, 1.0), (1.0, 1.0)]
    expected["open_clip local_loss"] = [(0.418, 0.844), (0.412, 0.804), (1.0, 1.0)]
    for rank in range(2):
        got = torch.load(folder / f"flags {rank}.pt", weights_only=True)
        assert got.keys() == expected.keys()
        for name, grads in got.items():
            for mine, true, (length, cosine) in zip(grads, (image, text, scale), expected[name], strict=True):
                unit = 1e-3 if name == "open_clip local_loss" else 1e-9
                assert (mine.norm() / true.norm()).item() == pytest.approx(length, abs=unit), name
                assert ((mine * true).sum() / (mine.norm() * true.norm())).item() == pytest.approx(cosine, abs=unit), name


def nccl_job(rank: int, size: int, folder: str) -> None:
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", store=dist.FileStore(f"{folder}/store", size), rank=rank, world_size=size)
    ranks.PART_BYTES = 4 * size * D * 2
    own = [x.split(UNEVEN[:size])[rank].cuda() for x in batch(UNEVEN[:size], torch.bfloat16)]
    found = {loss: gradients(loss, *own, dist.group.WORLD) for loss in ("clip", "siglip")}
    torch.save({k: {name: x.cpu() for name, x in v.items()} for k, v in found.items()}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_nccl(tmp_path: Path) -> None:
    size = min(torch.cuda.device_count(), WORLD)
    mp.spawn(nccl_job, (size, str(tmp_path)), size)
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(size)]
    for loss in ("clip", "siglip"):
        truth = gradients(loss, *(x.double() for x in batch(UNEVEN[:size], torch.bfloat16)[:2]),
                          batch(UNEVEN[:size], torch.bfloat16)[2])  # fmt: skip
        for each in found:
            assert (each[loss]["loss"] - truth["loss"]).abs() < 1e-4 * truth["loss"].abs()
        joined = torch.cat([each[loss]["image"] for each in found]) / size
        assert (joined - truth["image"]).norm() < 2e-2 * truth["image"].norm()
