"""Text to tokens and images to pixels against what they replace, one thread of Python each."""

from __future__ import annotations

import random

import numpy as np
import open_clip
import pytest
from PIL import Image
from torchvision import transforms as T

from clipfast.image import MEAN, STD, Preprocess
from clipfast.tokenizer import SimpleTokenizer, tokenize

NOUNS = """dog cat horse train bicycle kitchen beach mountain umbrella sandwich laptop guitar child woman man giraffe clock
    bridge river boat pizza keyboard vase snowboard skateboard elephant zebra traffic light bench bird bus truck""".split()  # noqa: SIM905
ADJECTIVES = """red old small wooden bright empty crowded snowy quiet broken colourful tall shiny dusty striped""".split()  # noqa: SIM905


def captions(count: int) -> list[str]:
    """Distinct captions of a dozen words, COCO's length, as a seed makes them."""
    rng = random.Random(0)
    return [
        f"A {rng.choice(ADJECTIVES)} {rng.choice(NOUNS)} and {rng.randint(2, 99)} {rng.choice(NOUNS)}s near the "
        f"{rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}, photo {i}."
        for i in range(count)
    ]


def test_tokenize(compare) -> None:
    texts = captions(5000)
    reference = open_clip.tokenizer.SimpleTokenizer()
    assert (tokenize(texts) == reference(texts, 77)).all()

    def theirs() -> None:
        open_clip.tokenizer.SimpleTokenizer()(texts, 77)  # new: its cache of words starts empty, and so does ours

    def ours() -> None:
        tokenizer = SimpleTokenizer()
        tokenizer.rows(texts, 77, False)

    warm = open_clip.tokenizer.SimpleTokenizer()
    compare(ours, {"open_clip": theirs, "open_clip, words known": lambda: warm(texts, 77)}, rounds=5, items=len(texts))


def test_tokenize_words_known(compare) -> None:
    """A long run: the words have been met."""
    texts = captions(5000)
    warm = open_clip.tokenizer.SimpleTokenizer()
    compare(lambda: tokenize(texts), {"open_clip": lambda: warm(texts, 77)}, rounds=5, items=len(texts))


@pytest.mark.parametrize("size", [(500, 375), (1280, 960)], ids=lambda size: "{} x {}".format(*size))
def test_preprocess(compare, size: tuple[int, int]) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8))
    steps = [T.Resize(224, T.InterpolationMode.BICUBIC), T.CenterCrop(224), T.ToTensor(), T.Normalize(MEAN, STD)]
    theirs, ours = T.Compose(steps), Preprocess(224)
    assert (ours(image) == theirs(image)).all()
    compare(lambda: ours(image), {"torchvision": lambda: theirs(image)}, rounds=21)
