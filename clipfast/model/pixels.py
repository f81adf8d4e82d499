"""What an image tower knows of the images that it was trained on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from clipfast.inputs.image import Preprocess


class Pixels:
    """Of both image towers: `preprocess`, the transform that makes their input, and what open_clip reads of it."""

    preprocess: Preprocess

    @property
    def preprocess_cfg(self) -> dict[str, Any]:
        """open_clip's fields of the transform; setting them sets it."""
        made = self.preprocess
        told = {"size": made.size, "mode": "RGB", "mean": made.mean, "std": made.std, "interpolation": made.interpolation}
        return told | {"resize_mode": made.resize, "fill_color": made.fill}

    @preprocess_cfg.setter
    def preprocess_cfg(self, told: Mapping[str, Any]) -> None:
        self.preprocess = Preprocess.from_open_clip({"size": self.preprocess.size} | dict(told))
