"""One model in eight threads, and memory over many calls of everything."""

import threading
from concurrent.futures import ThreadPoolExecutor

import torch

from clipfast import clip_loss, tokenize
from clipfast.inputs import Preprocess
from clipfast.model import CLIP
from tests.data.test_data import png
from tests.hostile.steady import GROWTH, MODEL, growth


def test_eight_threads_on_one_model_get_equal_bits() -> None:
    torch.manual_seed(0)
    model, transform = CLIP(**MODEL), Preprocess(32)
    reader, start = CLIP(**MODEL).eval().for_inference(), threading.Barrier(8)
    texts = ["a dog", "two cats on a mat", "new words: zyxwv", ""]

    def answers(thread: int) -> list[torch.Tensor]:
        start.wait(60)
        images = torch.stack([transform(png(number)) for number in range(4)])
        made = []
        for turn in range(4):
            tokens = tokenize([*texts, f"word{turn}q"], 16)
            with torch.no_grad():
                made += [images, tokens, model.encode_image(images), model.encode_text(tokens), *model(images, tokens)]
                made += [reader.encode_image(images), reader.encode_text(tokens)]
            features = model.encode_image(images, normalize=True), model.encode_text(tokens[:4], normalize=True)
            loss = clip_loss(*features, model.logit_scale.exp())
            made += [loss.detach(), *torch.autograd.grad(loss, [*model.parameters()])]
        return made

    with ThreadPoolExecutor(8) as pool:
        found = [*pool.map(answers, range(8))]
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


def test_memory_stays_what_it_was() -> None:
    made, grown = growth(300)
    assert made == 300 and grown < GROWTH, f"{grown >> 20} MB more"
