"""Beside processes that keep a core busy each, as on a machine that is shared: what a call takes there and when it is alone.

A row is ours and the rival beside the neighbours; `alone_ms` is what either takes while these stand still.
"""

from __future__ import annotations

import copy
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from bench.measure import DEVICE, seconds
from bench.rivals import open_clip, open_clip_model
from bench.test_towers import CAPTIONS
from clipfast.inputs.tokenizer import tokenize
from clipfast.loss import clip_loss
from clipfast.model import CLIP, MODELS

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="it is the processor that is shared")
SIZES = MODELS["ViT-B/32"] | {"vision_layers": 4, "transformer_layers": 4}  # deep enough for a tower's share of waiting


@contextmanager
def neighbours(count: int) -> Iterator[Callable[[bool, Callable[[], Any]], Callable[[], Any]]]:
    """`count` processes that compute and stand still in turn; -> what makes of a call one beside them (True) or alone."""
    running = [subprocess.Popen([sys.executable, "-SEc", "while True: pass"]) for _ in range(count)]

    def set_to(busy: bool) -> None:
        for one in running:
            os.kill(one.pid, signal.SIGCONT if busy else signal.SIGSTOP)

    def beside(busy: bool, call: Callable[[], Any]) -> Callable[[], Any]:
        def run() -> None:
            set_to(busy)
            call()

        return run

    try:
        yield beside
    finally:
        for one in running:
            one.kill()
            one.wait()


@pytest.fixture(scope="module")
def models() -> tuple[CLIP, Any]:
    torch.manual_seed(0)
    ours = CLIP(**SIZES)
    return ours, open_clip_model(SIZES, copy.deepcopy(ours.state_dict()))


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("what", ["encode text", "training step"])
def test_beside(compare, models, what: str, count: int) -> None:
    ours, theirs = models
    text, lengths = tokenize(CAPTIONS, return_lengths=True)
    image = torch.randn(len(text), 3, 224, 224, generator=torch.Generator().manual_seed(0))

    def encode_ours() -> None:
        with torch.no_grad():
            ours.encode_text(text, lengths=lengths)

    def encode_theirs() -> None:
        with torch.no_grad():
            theirs.encode_text(text)

    def step_of_ours() -> None:
        ours.zero_grad(set_to_none=True)
        features = ours.encode_image(image), ours.encode_text(text, lengths=lengths)
        clip_loss(*features, ours.logit_scale.exp(), normalize=True).backward()

    def step_of_theirs() -> None:
        theirs.zero_grad(set_to_none=True)
        features = theirs.encode_image(image), theirs.encode_text(text)
        open_clip.loss.ClipLoss()(*(F.normalize(f, dim=-1) for f in features), theirs.logit_scale.exp()).backward()

    own, other = (encode_ours, encode_theirs) if what == "encode text" else (step_of_ours, step_of_theirs)
    for model in models:
        if not isinstance(model, str):
            model.train(what != "encode text")
    with neighbours(count) as beside:
        calls = {"ours": own} if isinstance(theirs, str) else {"ours": own, "open_clip": other}
        alone = {name: 1e3 * typical(beside(False, call)) for name, call in calls.items()}
        rival = theirs if isinstance(theirs, str) else beside(True, other)
        rounds = 9 if what == "encode text" else 5  # a step of theirs takes seconds
        compare(beside(True, own), {"open_clip": rival}, rounds=rounds, items=len(text), alone_ms=alone)


def typical(call: Callable[[], Any], rounds: int = 3) -> float:
    """The median of a call's seconds."""
    call()
    return median(seconds(call) for _ in range(rounds))
