"""Evaluation against dense definitions, and features on disk."""

import re

import open_clip
import pytest
import torch
import torch.nn.functional as F
from open_clip.zero_shot_metadata import OPENAI_IMAGENET_TEMPLATES
from torch import Tensor

from clipfast.data import DataConfig
from clipfast.data.sources import Sample, read_folder, read_table
from clipfast.evaluate import (
    Bench,
    EvalSet,
    classify,
    encode_texts,
    metrics,
    retrieval,
    retrieval_source,
    zero_shot,
    zero_shot_source,
    zero_shot_weights,
)
from clipfast.inputs.image import Preprocess
from clipfast.inputs.tokenizer import tokenize
from clipfast.model import CLIP
from clipfast.train.job import Job
from tests.data.test_data import caption, png, write_shards, write_table, write_tar

SIZES = {
    "embed_dim": 16, "image_resolution": 32, "vision_layers": 1, "vision_width": 64, "vision_patch_size": 16,
    "context_length": 77, "vocab_size": 49408, "transformer_width": 64, "transformer_heads": 1, "transformer_layers": 1,
}  # fmt: skip
PREPROCESS = Preprocess(32)


@pytest.fixture(scope="module")
def model() -> CLIP:
    torch.manual_seed(0)
    return CLIP(**SIZES).eval()


def reference_image(model: CLIP, content: bytes) -> Tensor:
    with torch.no_grad():
        return F.normalize(model.encode_image(PREPROCESS(content)[None]), dim=-1)[0]


def reference_text(model: CLIP, text: str) -> Tensor:
    with torch.no_grad():
        return F.normalize(model.encode_text(tokenize([text])), dim=-1)[0]


# ---- ranks -------------------------------------------------------------------------------------------------------------------


def dense_recall(scores: Tensor, right: Tensor, k: int) -> float:
    """Sort everything; of equal scores the first index first."""
    order = scores.sort(dim=1, descending=True, stable=True).indices[:, :k]
    return right.gather(1, order).any(1).double().mean().item()


def small(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Few distinct integers: their dot products are exact, and many are equal."""
    return torch.randint(-1, 2, shape, generator=generator).float()


@pytest.mark.parametrize("scores_at_a_time", [1, 40, 1 << 24])
@pytest.mark.parametrize("ties", [False, True])
def test_zero_shot_is_what_sorting_says(monkeypatch, scores_at_a_time, ties):
    monkeypatch.setattr(metrics, "SCORES", scores_at_a_time)
    generator = torch.Generator().manual_seed(0)
    make = small if ties else (lambda shape, generator: torch.randn(shape, generator=generator))
    features, weights = make((60, 3), generator), make((17, 3), generator)
    targets = torch.randint(0, 17, (60,), generator=generator)
    right = F.one_hot(targets, 17).bool()
    expected = {f"top{k}": dense_recall(features @ weights.T, right, k) for k in (1, 5)}
    assert zero_shot(features, weights, targets) == pytest.approx(expected)
    assert 0 < expected["top1"] < expected["top5"] < 1


def test_zero_shot_among_some_of_the_classes():
    generator = torch.Generator().manual_seed(0)
    features, weights = torch.randn(40, 4, generator=generator), torch.randn(30, 4, generator=generator)
    subset = torch.tensor([20, 3, 7, 11, 29, 0, 15])
    chosen = torch.randint(0, 7, (40,), generator=generator)
    expected = {f"top{k}": dense_recall(features @ weights[subset].T, F.one_hot(chosen, 7).bool(), k) for k in (1, 5)}
    assert zero_shot(features, weights, subset[chosen], subset=subset) == pytest.approx(expected)
    with pytest.raises(ValueError, match="every target among the 7 classes of the subset, 1 are not"):
        zero_shot(features[:2], weights, torch.tensor([20, 4]), subset=subset)


@pytest.mark.parametrize("scores_at_a_time", [1, 200, 1 << 24])
@pytest.mark.parametrize("ties", [False, True])
def test_retrieval_is_what_sorting_says(monkeypatch, scores_at_a_time, ties):
    """Three captions an image, in mixed order."""
    monkeypatch.setattr(metrics, "SCORES", scores_at_a_time)
    generator = torch.Generator().manual_seed(1)
    make = small if ties else (lambda shape, generator: torch.randn(shape, generator=generator))
    image, text = make((30, 4), generator), make((90, 4), generator)
    owner = torch.arange(30).repeat(3)[torch.randperm(90, generator=generator)]
    right = torch.arange(30)[:, None] == owner
    expected = {}
    for k in (1, 5, 10):
        expected[f"image_to_text_R@{k}"] = dense_recall(image @ text.T, right, k)
        expected[f"text_to_image_R@{k}"] = dense_recall(text @ image.T, right.T, k)
    assert retrieval(image, text, torch.arange(30), owner) == pytest.approx(expected)
    assert len(set(expected.values())) == 6


def test_retrieval_of_pairs():
    features = F.normalize(torch.randn(50, 8, generator=torch.Generator().manual_seed(0)), dim=-1)
    assert set(retrieval(features, features).values()) == {1.0}
    shifted = retrieval(features, features.roll(1, 0), ks=[1, 50])
    assert shifted == {"image_to_text_R@1": 0, "image_to_text_R@50": 1, "text_to_image_R@1": 0, "text_to_image_R@50": 1}
    with pytest.raises(ValueError, match="got 50 images and 49 texts"):
        retrieval(features, features[1:])
    with pytest.raises(ValueError, match="a right answer for every query"):
        retrieval(features, features, torch.arange(50), torch.arange(50).clamp(max=48))


def test_features_that_are_not_finite_are_refused():
    features = torch.randn(5, 8)
    features[3, 2] = torch.nan
    for call in (lambda: retrieval(features, features), lambda: zero_shot(features, torch.randn(4, 8), torch.zeros(5).long())):
        with pytest.raises(ValueError, match="expected finite features"):
            call()


def test_retrieval_never_holds_all_scores(monkeypatch):
    monkeypatch.setattr(metrics, "SCORES", 1000)
    largest = 0

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            if isinstance(result, Tensor):
                largest = max(largest, result.numel())
            return result

    features = torch.randn(300, 4)
    with Watch():
        retrieval(features, features)
    assert 300 * 4 <= largest <= 4 * 300


# ---- a model's classifier ----------------------------------------------------------------------------------------------------


def test_prompts_are_normalised_averaged_and_normalised(model):
    names, templates = ["cat", "dog", "{x}"], ["a photo of a {}.", "{}", "the {}, a {}"]
    rows = []
    for name in names:
        mean = torch.stack([reference_text(model, template.replace("{}", name)) for template in templates]).mean(0)
        rows.append(mean / mean.norm())
    torch.testing.assert_close(zero_shot_weights(model, names, templates), torch.stack(rows), atol=1e-5, rtol=1e-5)
    others = ["a photo of a {0}.", lambda name: name, "the {c}, a {}"]
    for batch_size in (256, 2):
        again = zero_shot_weights(model, tuple(names), others, batch_size)
        torch.testing.assert_close(again, torch.stack(rows), atol=1e-5, rtol=1e-5)
    for one in ("{}", str):
        torch.testing.assert_close(zero_shot_weights(model, names, one), zero_shot_weights(model, names, ["{}"]))


def test_the_classifier_is_open_clips(model):
    """The functions of its list of templates, and its loop."""
    names, templates = ["golden retriever", "café"], OPENAI_IMAGENET_TEMPLATES[:5]
    expected = open_clip.build_zero_shot_classifier(model, open_clip.get_tokenizer("ViT-B-32"), names, templates)
    torch.testing.assert_close(zero_shot_weights(model, names, templates), expected.T, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("names", "templates", "error", "message"),
    [
        (
            ["cat"],
            ["{}", "a photo"],
            ValueError,
            "a place for the class name, {}, {0} or {c}, in every template, got 'a photo'",
        ),
        (["cat"], ["a {name}"], ValueError, "{}, {0} or {c}, in every template, got 'a {name}'"),
        ([], ["{}"], ValueError, "class names and templates, got 0 names and 1 templates"),
        (["cat"], [], ValueError, "class names and templates, got 1 names and 0 templates"),
        ("cat", ["{}"], TypeError, "a sequence of class names, got the text 'cat'; pass ['cat']"),
        (["cat", 3], ["{}"], TypeError, "text as class names, got 3"),
        (["cat"], [b"{}"], TypeError, "a template as text or a function, got bytes"),
        (["cat"], [len], TypeError, "a template that gives text, got 3 for 'cat'"),
    ],
)
def test_bad_names_and_templates(model, names, templates, error, message):
    with pytest.raises(error, match=re.escape(message)):
        zero_shot_weights(model, names, templates)


def test_texts_are_encoded_in_chunks_and_the_mode_comes_back(model):
    texts = [caption(number) for number in range(7)]
    model.train()
    features = encode_texts(model, texts, batch_size=3)
    assert model.training and model.visual.training and not features.requires_grad
    model.eval()
    torch.testing.assert_close(features, torch.stack([reference_text(model, text) for text in texts]), atol=1e-5, rtol=1e-5)


def test_classify_is_the_softmax_of_scaled_cosines(model):
    texts = ["red", "green", "blue"]
    pixels = torch.stack([PREPROCESS(png(number)) for number in (1, 40)])
    with torch.no_grad():
        expected = model(pixels, tokenize(texts))[0].softmax(-1)
    torch.testing.assert_close(classify(model, pixels, texts), expected, atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="text 2 of 3 is empty"):
        classify(model, pixels, ["red", " ", "blue"])
    with pytest.raises(RuntimeError, match="too long for context length 77"):
        classify(model, pixels, ["word " * 500])


# ---- sources -----------------------------------------------------------------------------------------------------------------


def write_folders(root) -> dict[str, list[int]]:
    classes = {"n01": [3, 60, 200], "n02": [9, 100], "n03": [150]}
    for name, members in classes.items():
        (root / name).mkdir(parents=True)
        for number in members:
            (root / name / f"{number}.png").write_bytes(png(number))
    return classes


@pytest.mark.parametrize("given", [None, {"n02": "green", "n01": "red", "n03": "blue", "n04": "grey"}])
def test_zero_shot_on_a_folder_of_classes(model, tmp_path, given):
    folders = write_folders(tmp_path)
    names = given or {name: name for name in folders}
    weights = torch.stack([reference_text(model, f"a {name}") for name in names.values()])
    features = torch.stack([reference_image(model, png(number)) for members in folders.values() for number in members])
    targets = torch.tensor([list(names).index(name) for name, members in folders.items() for _ in members])
    expected = {f"top{k}": dense_recall(features @ weights.T, F.one_hot(targets, len(names)).bool(), k) for k in (1, 5)}
    got = zero_shot_source(model, PREPROCESS, read_folder(tmp_path), given, ["a {}"], batch_size=4)
    assert got == pytest.approx(expected | {"images": 6, "classes": len(names)})
    with pytest.raises(ValueError, match=r"every class among the 1 given, got \['n02', 'n03'\]"):
        zero_shot_source(model, PREPROCESS, read_folder(tmp_path), {"n01": "red"})


def test_zero_shot_on_shards_with_class_numbers(model, tmp_path):
    numbers = {"a": 2, "b": 0, "c": 2, "d": 1}
    files = {}
    for place, (key, number) in enumerate(numbers.items()):
        files |= {f"{key}.png": png(60 * place), f"{key}.cls": str(number).encode()}
    write_tar(tmp_path / "0.tar", files)
    names = ["red", "green", "blue"]
    features = torch.stack([reference_image(model, png(60 * place)) for place in range(4)])
    weights = torch.stack([reference_text(model, f"a photo of a {name}.") for name in names])
    right = F.one_hot(torch.tensor(list(numbers.values())), 3).bool()
    source = DataConfig(str(tmp_path / "0.tar")).open()
    got = zero_shot_source(model, PREPROCESS, source, {name: name for name in names})
    assert got == pytest.approx({"top1": dense_recall(features @ weights.T, right, 1), "top5": 1, "images": 4, "classes": 3})
    unlabelled = DataConfig(write_shards(tmp_path / "unlabelled")).open()
    with pytest.raises(ValueError, match="expected the class of every image .* but 0000 has none"):
        zero_shot_source(model, PREPROCESS, unlabelled)


@pytest.mark.parametrize("form", ["table", "shards"])
def test_retrieval_on_a_source(model, tmp_path, form):
    captions = {number: [caption(number), f"drawing {number * 3}"] for number in (5, 80, 30, 222)}
    if form == "table":
        lines = [f"{number}.png,{text}" for turn in (0, 1) for number, texts in captions.items() for text in [texts[turn]]]
        (tmp_path / "t.csv").write_text("path,caption\n" + "\n".join(lines))
        for number in captions:
            (tmp_path / f"{number}.png").write_bytes(png(number))
        source = read_table(tmp_path / "t.csv")
    else:
        files = {}
        for number, texts in captions.items():
            files |= {f"{number}.png": png(number), f"{number}.txt": "\n".join(texts).encode()}
        write_tar(tmp_path / "0.tar", files)
        source = DataConfig(str(tmp_path / "0.tar")).open()
    image = torch.stack([reference_image(model, png(number)) for number in captions])
    text = torch.stack([reference_text(model, text) for texts in captions.values() for text in texts])
    right = torch.arange(4)[:, None] == torch.arange(4).repeat_interleave(2)
    got = retrieval_source(model, PREPROCESS, source)
    assert (got.pop("images"), got.pop("captions")) == (4, 8)
    assert got["image_to_text_R@1"] == pytest.approx(dense_recall(image @ text.T, right, 1))
    assert got["text_to_image_R@1"] == pytest.approx(dense_recall(text @ image.T, right.T, 1))
    assert got["image_to_text_R@10"] == got["text_to_image_R@5"] == 1
    framed = torch.stack([reference_text(model, f"a photo of {text}") for texts in captions.values() for text in texts])
    got = retrieval_source(model, PREPROCESS, source, "a photo of {}")  # the paper's
    assert got["image_to_text_R@1"] == pytest.approx(dense_recall(image @ framed.T, right, 1))
    assert got["text_to_image_R@1"] == pytest.approx(dense_recall(framed @ image.T, right.T, 1))
    path = str(tmp_path / ("t.csv" if form == "table" else "0.tar"))
    bench = Bench(model, PREPROCESS, EvalSet("framed", test=path, templates=("a photo of {}",)))
    assert {name: bench.retrieval()[name] for name in got} == pytest.approx(got)
    with pytest.raises(ValueError, match="two: expected one template for the captions of retrieval, got 2"):
        Bench(model, PREPROCESS, EvalSet("two", test=path, templates=("a {}", "the {}"))).retrieval()


def test_samples_without_an_image_are_counted(model):
    class Source:
        parts = 1

        def samples(self, *_, **__):
            return iter([Sample("x", None, "text", {})])

    with pytest.raises(ValueError, match="got 1 of 1, last x: expected an image"):
        retrieval_source(model, PREPROCESS, Source())


# ---- over ranks --------------------------------------------------------------------------------------------------------------


class Others(Job):
    """This process as each of several ranks in turn: what the earlier ones told is played to the later ones."""

    def __init__(self, rank: int, world: int, told: list[list]) -> None:
        super().__init__(rank, world, torch.device("cpu"))
        self.told, self.calls = told, 0

    def gather(self, value):
        if self.calls == len(self.told):
            self.told.append([])
        told = self.told[self.calls]
        told[self.rank : self.rank + 1] = [value]
        self.calls += 1
        for given in told:
            if isinstance(given, Exception):
                raise given
        return told


def over_ranks(measure, world: int) -> dict[str, float]:
    """The last rank's result once all have told what they have; two passes, as what is told second depends on the first."""
    told: list[list] = []
    for _ in range(2):
        for rank in range(world):
            result = measure(Others(rank, world, told))
    return result


@pytest.mark.parametrize("world", [2, 5])
@pytest.mark.parametrize("kind", ["shards", "table"])
def test_retrieval_over_ranks_is_that_of_one(model, tmp_path, kind, world):
    where = write_shards(tmp_path) if kind == "shards" else write_table(tmp_path)
    if kind == "table":  # a second caption for some images, whose rows come to other ranks
        with open(where, "a") as file:
            file.write("".join(f"{n}.png,another {n}\n" for n in range(7)))
    source = DataConfig(where).open()
    alone = retrieval_source(model, PREPROCESS, source)
    assert over_ranks(lambda job: retrieval_source(model, PREPROCESS, source, job=job), world) == alone
    assert alone["captions"] == (24 if kind == "shards" else 31)


@pytest.mark.parametrize("world", [2, 7])
def test_zero_shot_over_ranks_is_that_of_one(model, tmp_path, world):
    for number in range(6):
        (tmp_path / f"class {number % 4}").mkdir(exist_ok=True)
        (tmp_path / f"class {number % 4}" / f"{number}.png").write_bytes(png(number * 31))
    source = read_folder(tmp_path)
    alone = zero_shot_source(model, PREPROCESS, source)
    assert over_ranks(lambda job: zero_shot_source(model, PREPROCESS, source, job=job), world) == alone
    (tmp_path / "class 3" / "3.png").write_bytes(b"broken")
    with pytest.raises(ValueError, match="unreadable samples"):
        over_ranks(lambda job: zero_shot_source(model, PREPROCESS, read_folder(tmp_path), job=job), world)
