"""Near-duplicates by features and by hash, and what they are worth."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.fft
import scipy.stats
import torch
from PIL import Image, ImageFilter

from clipfast.evaluate import metrics, overlap
from clipfast.evaluate.overlap import bits_apart, nearest, overlaps, perceptual_hash, sheet


def picture(seed, side=96):
    """A smooth random image."""
    noise = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((side, side), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("scores_at_a_time", [1, 60, 1 << 24])
def test_nearest_is_what_all_pairs_say(monkeypatch, tmp_path, scores_at_a_time):
    monkeypatch.setattr(metrics, "SCORES", scores_at_a_time)
    rng = np.random.default_rng(0)
    test, train = rng.normal(size=(23, 5)).astype(np.float32), rng.normal(size=(70, 5)).astype(np.float32)
    train[[40, 66]] = 3 * test[7]  # the same direction twice: the first is named
    np.save(tmp_path / "part.npy", train[31:])
    parts = [torch.tensor(train[:31]), np.load(tmp_path / "part.npy", mmap_mode="r")]
    found = nearest(test, iter(parts))
    length = np.linalg.norm
    cosines = (test / length(test, axis=1, keepdims=True)) @ (train / length(train, axis=1, keepdims=True)).T
    expected = cosines.argmax(1)
    expected[7] = 40
    assert found.row.tolist() == expected.tolist()
    assert found.similarity == pytest.approx(cosines.max(1), abs=1e-6) and found.similarity[7] == pytest.approx(1)


def test_nearest_by_faiss(monkeypatch):
    """Where it imports; here what it is asked is checked, and that its answer is taken block by block, the first of equals."""
    asked = []

    def knn(queries, block, k, metric):
        asked.append((len(block), k, metric))
        scores = queries @ block.T
        place = scores.argmax(1)
        return scores[np.arange(len(queries)), place][:, None], place[:, None]

    rng = np.random.default_rng(0)
    test, train = rng.normal(size=(9, 4)).astype(np.float32), rng.normal(size=(50, 4)).astype(np.float32)
    train[30] = train[4] = test[2]
    monkeypatch.setattr(overlap, "_faiss", lambda: None)
    expected = nearest(test, [train])
    monkeypatch.setattr(overlap, "_faiss", lambda: SimpleNamespace(knn=knn, METRIC_INNER_PRODUCT=0))
    monkeypatch.setattr(metrics, "SCORES", 80)
    found = nearest(test, [train[:27], train[27:]])
    assert found.row.tolist() == expected.row.tolist() and found.row[2] == 4
    assert found.similarity == pytest.approx(expected.similarity, abs=1e-6)
    assert asked == [(20, 1, 0), (7, 1, 0), (20, 1, 0), (3, 1, 0)]
    monkeypatch.undo()
    pytest.importorskip("faiss")
    assert nearest(test, [train]).row.tolist() == expected.row.tolist()


def test_the_hash_is_the_sign_of_the_lowest_frequencies():
    for seed in range(3):
        image = picture(seed)
        grey = np.asarray(image.convert("L").resize((32, 32), Image.Resampling.LANCZOS), dtype=float)
        low = scipy.fft.dctn(grey)[:8, :8]
        assert ((perceptual_hash(image) > 0) == (low > np.median(low)).ravel()).all()
    flat = [perceptual_hash(Image.new("RGB", (50, 40), colour)) for colour in ("white", "grey")]
    assert (flat[0] == flat[1]).all()


def test_a_changed_copy_is_found_by_its_hash(tmp_path):
    train = [picture(seed) for seed in range(12)]
    changed = train[5].resize((70, 70)).filter(ImageFilter.GaussianBlur(1))
    changed.save(tmp_path / "copy.jpg", quality=40)
    test = [Image.open(tmp_path / "copy.jpg"), picture(100)]
    hashes = [np.stack([perceptual_hash(image) for image in images]) for images in (test, train)]
    found = nearest(hashes[0], [hashes[1]])
    differ = [[int((a != b).sum()) for b in hashes[1]] for a in hashes[0]]
    assert bits_apart(found.similarity).tolist() == [min(row) for row in differ]
    assert found.row[0] == 5 and differ[0][5] <= 4 < 12 < min(differ[1])


def test_accuracies_on_overlap_and_clean():
    seen = np.repeat([True, False], [20, 80])
    right = np.r_[np.ones(18), np.zeros(2), np.ones(40), np.zeros(40)]
    none = {"none": np.zeros(5, bool), "every": np.ones(4, bool)}
    found = overlaps(
        {"photos": right, "other": right[::-1], "none": [1, 1, 0, 1, 0], "every": [1, 0, 1, 1]},
        {"photos": seen, "other": seen, **none},
    )
    photos, other, clean, every = found.sets
    assert (photos.images, photos.overlapping, photos.all, photos.overlap, photos.clean) == (100, 20, 0.58, 0.9, 0.5)
    assert photos.gain == pytest.approx(0.08)
    expected = scipy.stats.binom.sf(17, 20, 0.5)
    assert photos.p == pytest.approx(expected) and photos.adjusted == pytest.approx(2 * expected)  # two sets could be tested
    assert photos.interval == tuple(scipy.stats.binomtest(18, 20).proportion_ci(0.995))
    assert other.overlap == 0 and other.p == other.adjusted == 1.0
    assert clean.overlap is clean.p is clean.interval is None and clean.gain == 0
    assert every.clean is every.p is every.gain is None and every.overlap == 0.75
    assert len(found.table().splitlines()) == 5 and json.loads(json.dumps(found.summary()))["sets"][0]["overlap"] == 0.9


def test_a_sheet_shows_each_pair_beside_each_other():
    red, blue = Image.new("RGB", (40, 20), "red"), Image.new("RGBA", (20, 40), "blue")
    page = sheet([(red, blue, "0.98")] * 3, columns=2, side=20)
    assert page.size == (2 * (48 + 8) + 8, 2 * 42 + 8)
    assert page.getpixel((18, 18)) == (255, 0, 0) and page.getpixel((38, 18)) == (0, 0, 255)
    assert page.getpixel((64 + 18, 18)) == (255, 0, 0) and page.getpixel((18, 42 + 18)) == (255, 0, 0)
    assert page.getpixel((64 + 18, 42 + 18)) == (255, 255, 255)  # no fourth pair


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: nearest(np.ones((2, 3)), [np.ones((2, 4))]), r"train features \[N, 3\], as wide as test's, got \(2, 4\)"),
        (lambda: nearest(np.ones((2, 3)), []), "expected training features, got none"),
        (lambda: nearest(np.full((1, 3), np.nan), [np.ones((2, 3))]), "finite test features"),
        (lambda: nearest(np.ones((1, 3)), [np.zeros((2, 3))]), "finite train features, and none all zero"),
        (lambda: overlaps({"a": [1]}, {"b": [1]}), r"got \['a'\] and \['b'\]"),
        (lambda: overlaps({"a": [1, 0]}, {"a": [1]}), "hits of a as duplicates, got 2 and 1"),
        (lambda: sheet([]), "got none"),
    ],
)
def test_bad_input_is_one_clear_line(call, message):
    with pytest.raises(ValueError, match=message):
        call()
