"""Icon sets with names: sixteen openly licensed packages, of which one is drawn by nobody who is learned from.

An icon is named by its file: "piggy-bank". What several sets draw under one name is one concept in several styles, as emoji
are. `prepare` fetches and renders once; `load` joins the drawings to the emoji's.
"""

from __future__ import annotations

import re
import tarfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from demo import emoji
from demo.emoji import Concept, Drawings

UNSEEN_SET = "fa6-solid"
# set -> version of @iconify-json/<set>, licence, author, and a pattern of the names that are left out: another weight or fill
# of the same drawing, logos, numbers
SETS = {
    "mdi": ("1.2.3", "Apache-2.0", "Pictogrammers, https://github.com/Templarian/MaterialDesign",
            r"-(outline|variant|box|circle|off|thin|remove|minus|plus|check|alert|multiple)$|^alpha"),
    "tabler": ("1.2.41", "MIT", "Pawel Kuna, https://github.com/tabler/tabler-icons", "-filled$|^brand-|-off$"),
    "ph": ("1.2.2", "MIT", "Phosphor Icons, https://github.com/phosphor-icons/core",
           "-(bold|fill|duotone|light|thin|logo)$"),
    "lucide": ("1.2.137", "ISC", "Lucide Contributors, https://github.com/lucide-icons/lucide", "-off$"),
    "bi": ("1.2.7", "MIT", "The Bootstrap Authors, https://github.com/twbs/icons", "-fill$"),
    "carbon": ("1.2.29", "Apache-2.0", "IBM, https://github.com/carbon-design-system/carbon", "--|^(logo|watson|ibm)"),
    "game-icons": ("1.2.4", "CC-BY-3.0", "Lorc, Delapouite and others, https://game-icons.net", "$^"),
    "iconoir": ("1.2.11", "MIT", "Luca Burgio, https://github.com/iconoir-icons/iconoir", "-solid$"),
    "ion": ("1.2.7", "MIT", "Ben Sperry, https://github.com/ionic-team/ionicons", "-(outline|sharp)$|^(logo|ios|md)-"),
    "mingcute": ("1.2.8", "Apache-2.0", "MingCute Design, https://github.com/Richard9394/MingCute", "-line$"),
    "material-symbols": ("1.2.98", "Apache-2.0", "Google, https://github.com/google/material-design-icons",
                         "outline|rounded|sharp"),
    "healthicons": ("1.2.13", "MIT", "Resolve to Save Lives, https://healthicons.org", "24px|outline|negative"),
    "solar": ("1.2.13", "CC-BY-4.0", "480 Design, https://www.figma.com/community/file/1166831539721848736",
              "-(broken|line-duotone|linear|outline|bold)$"),
    "ri": ("1.2.10", "Apache-2.0", "Remix Design, https://github.com/Remix-Design/RemixIcon", "-line$"),
    "boxicons": ("1.2.0", "MIT", "Boxicons, https://github.com/box-icons/boxicons", "-filled$"),
    "fa6-solid": ("1.2.4", "CC-BY-4.0", "Dave Gandy, https://github.com/FortAwesome/Font-Awesome", "$^"),
}  # fmt: skip
_STYLE = re.compile("-(fill|bold-duotone)$")  # of the variant that is kept of a set
LONGEST = 3  # words of a name


def labels(icons: dict, left_out: str) -> dict[str, str]:
    """Label -> name of the icon, in the order of the package; each label once, names with a number or of many words not."""
    found: dict[str, str] = {}
    for name, icon in icons["icons"].items():
        label = _STYLE.sub("", name).replace("-", " ").replace("_", " ").strip()
        wanted = not re.search(left_out, name) and not icon.get("hidden") and not re.search(r"\d", label)
        if wanted and 0 < len(label.split()) <= LONGEST:
            found.setdefault(label, name)
    return found


def prepare(root: Path = emoji.DATA) -> Path:
    """Fetches and renders what is missing below `root`; returns the folder with a tar of <label>.png for each set."""
    folder = root / "icons"
    emoji.fetch(root, [(f"@iconify-json/{name}", about[0]) for name, about in SETS.items()])
    packages = {}
    for name, (version, _, _, left_out) in SETS.items():
        (icons,) = emoji.read_json(root, f"@iconify-json/{name}", version, ["icons.json"])
        packages[name] = icons, labels(icons, left_out)
    drawn = defaultdict(list)
    for name, (_, own) in packages.items():
        for label in own:
            drawn[label].append(name)
    for name, (icons, own) in packages.items():
        path = folder / f"{name}-{SETS[name][0]}.tar"
        if path.exists():
            continue
        shared = [label for label in own if len(set(drawn[label]) - {UNSEEN_SET}) > 1]
        with emoji.written_aside(path) as aside, tarfile.open(aside, "w") as tar:
            for label in tqdm(shared, desc=f"rendering {name}", unit="icon"):
                svg = emoji.svg_of(icons, own[label])
                if svg is not None:
                    emoji.add(tar, f"{label}.png", emoji.render(svg, f"{name} {label}"))
    note = [f"@iconify-json/{name} {about[0]}: icons, {about[1]}, {about[2]}" for name, about in SETS.items()]
    (folder / "ATTRIBUTION.txt").write_text("\n".join(note) + "\n", encoding="utf-8")
    return folder


def load(concepts: Sequence[Concept], root: Path = emoji.DATA) -> tuple[Drawings, Drawings]:
    """The icons of the sets that are learned from, and those of the unseen set. Their concepts come after the emoji's; where an
    emoji has the same label the concept is the emoji's, and where that is unseen in training the icon is left out."""
    joined, places = list(concepts), {concept.label: place for place, concept in enumerate(concepts)}
    sides: dict[bool, tuple[list, list[int], list[str]]] = {True: ([], [], []), False: ([], [], [])}
    for name in SETS:
        pixels, own, styles = sides[name == UNSEEN_SET]
        for label, png in emoji.members(root / "icons" / f"{name}-{SETS[name][0]}.tar", ".png"):
            if label not in places:
                places[label] = len(joined)
                joined.append(Concept("", label, (), "icon", "icon", label, False))
            if not joined[places[label]].unseen:
                pixels.append(emoji.premultiply(emoji.decode(png)))
                own.append(places[label])
                styles.append(name)
    learned, unseen = (
        Drawings(torch.from_numpy(np.stack(pixels)), torch.tensor(own), styles, joined)
        for pixels, own, styles in (sides[False], sides[True])
    )
    return learned, unseen
