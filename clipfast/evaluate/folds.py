"""The standard splits of a data set that is measured as the mean over them: STL10's ten, UCF101's three."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import numpy as np

Fold = tuple[np.ndarray, np.ndarray]  # rows of training, rows of test; of the training split's rows and then the test split's


def read_folds(path: str, train: Sequence[str], test: Sequence[str]) -> list[Fold]:
    """Of a file with a line for each fold, the numbers of its training rows (STL10's fold_indices.txt), which leaves the test
    split whole; or of a folder of trainlistNN.txt and testlistNN.txt with a name in each line (UCF101's).

    train, test: the keys of both splits' images. Names are told apart by what stands before their first dot.
    """
    place = Path(path)
    if place.is_dir():
        return _lists(place, [*train, *test])
    folds = []
    for number, line in enumerate(place.read_text(encoding="utf-8").splitlines(), 1):
        if not (words := line.split()):
            continue
        if not all(word.isdecimal() and int(word) < len(train) for word in words):
            told = f"{path}, line {number}: expected numbers of training images from 0 to {len(train) - 1}"
            raise ValueError(f"{told}, got {line.strip()[:40]!r}")
        folds.append((np.array([*map(int, words)]), np.arange(len(train), len(train) + len(test))))
    if not folds:
        raise ValueError(f"{path}: expected a line of numbers for each fold, got none")
    return folds


def _lists(folder: Path, keys: Sequence[str]) -> list[Fold]:
    rows = {_stem(key): row for row, key in enumerate(keys)}
    trains = sorted(folder.glob("trainlist*.txt"))
    if not trains:
        raise FileNotFoundError(f"expected trainlist01.txt, testlist01.txt, ... in {folder}, found none")

    def found(path: Path) -> np.ndarray:
        names = [_stem(line.split()[0]) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        if absent := [name for name in names if name not in rows]:
            raise ValueError(f"{path}: expected names of images of the data, got {absent[0]!r} ({len(absent)} of {len(names)})")
        return np.array([rows[name] for name in names])

    return [(found(path), found(path.with_name(path.name.replace("train", "test")))) for path in trains]


def _stem(name: str) -> str:
    return PurePosixPath(name).name.partition(".")[0]
