"""Text to tokens and images to pixels against what they replace, one thread of Python each."""

from __future__ import annotations

import random

import numpy as np
import pytest
from PIL import Image

from bench.rivals import imported, open_clip
from clipfast.inputs.image import MEAN, STD, Preprocess
from clipfast.inputs.tokenizer import SimpleTokenizer, tokenize

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


@pytest.mark.parametrize("met", [True, False], ids=["words met before", "words new"])
def test_tokenize(compare, met: bool) -> None:
    """Both remember words: a long run meets them again, the first captions of a run do not."""
    texts = captions(5000)
    ours = SimpleTokenizer()

    def run_ours() -> None:
        if not met:
            ours._words.clear()
        ours.rows(texts, 77, False)

    if isinstance(open_clip, str):
        compare(run_ours, {"open_clip": open_clip}, rounds=5, items=len(texts))
        return
    theirs = open_clip.tokenizer.SimpleTokenizer()
    assert (tokenize(texts) == theirs(texts, 77)).all()
    special = {k: v for k, v in theirs.cache.items() if k.startswith("<")}

    def run_theirs() -> None:
        if not met:
            theirs.cache = dict(special)
        theirs(texts, 77)

    compare(run_ours, {"open_clip": run_theirs}, rounds=5, items=len(texts))


@pytest.mark.parametrize("size", [(500, 375), (1280, 960)], ids=lambda size: "{} x {}".format(*size))
def test_preprocess(compare, size: tuple[int, int]) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8))
    T, ours = imported("torchvision.transforms"), Preprocess(224)
    if isinstance(T, str):
        compare(lambda: ours(image), {"torchvision": T}, rounds=21, items=1)
        return
    theirs = T.Compose([T.Resize(224, T.InterpolationMode.BICUBIC), T.CenterCrop(224), T.ToTensor(), T.Normalize(MEAN, STD)])
    assert (ours(image) == theirs(image)).all()
    compare(lambda: ours(image), {"torchvision": lambda: theirs(image)}, rounds=21, items=1)
