"""One model in eight threads, and memory over many calls of everything."""

import contextlib
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from clipfast import clip_loss, siglip_loss, tokenize
from clipfast.inputs import Preprocess
from clipfast.kernels import use
from clipfast.model import CLIP
from tests.data.test_data import png
from tests.hostile.steady import GROWTH, MODEL, OBJECTS, grown, samples


@pytest.mark.filterwarnings("ignore:for_inference. weights are not packed")
def test_eight_threads_on_one_model_get_the_bits_of_one_thread() -> None:
    """Images, texts, losses and gradients, weights in 8 bits and packed; half of the threads force a backend now and then."""
    torch.manual_seed(0)
    model, transform, bias = CLIP(**MODEL), Preprocess(32), torch.tensor(-10.0)
    readers = [model.for_inference(**how) for how in ({}, {"int8": True}, {"packed": True})]
    texts = ["a dog", "two cats on a mat", "new words: zyxwv", ""]

    def features(images: Tensor, tokens: Tensor) -> list[Tensor]:
        encoded = model.encode_image(images, normalize=True), model.encode_text(tokens[:4], normalize=True)
        scale, made = model.logit_scale.exp(), []
        for loss in (clip_loss(*encoded, scale), siglip_loss(*encoded, scale, bias)):
            gradients = torch.autograd.grad(loss, [*model.parameters()], retain_graph=True)
            made += [loss.detach(), *gradients]
        return [*made, *(own.detach() for own in encoded)]

    def answers(forced: str) -> list[Tensor]:
        images, made = torch.stack([transform(png(number)) for number in range(4)]), []
        for turn in range(2):
            tokens = tokenize([*texts, f"word{turn}q"], 16)
            with torch.no_grad():
                made += [images, tokens, *model(images, tokens), model.encode_text(model.pack(tokens))]
                for reader in readers:
                    made += [reader.encode_image(images), reader.encode_text(tokens)]
            made += features(images, tokens)
            with use(forced) if forced else contextlib.nullcontext():
                made += features(images, tokens)
            made += features(images, tokens)
        return made

    alone, start = {forced: answers(forced) for forced in ("", "torch", "reference")}, threading.Barrier(8)

    def together(forced: str) -> bool:
        start.wait(60)
        found = answers(forced)
        return len(found) == len(alone[forced]) and all(map(torch.equal, found, alone[forced]))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(together, ["", "torch", "", "reference"] * 2))


def test_memory_stays_what_it_was() -> None:
    made, found = samples(300)
    memory, objects, files, threads = grown(found)
    assert made == 300 and memory < 4 * GROWTH, f"{memory >> 10} kB more"  # of few calls one late import is a part
    assert objects < OBJECTS and files <= 0 and threads <= 0
