"""Image-text pairs: where they lie, and batches of them."""

from clipfast.data.batches import (
    DRAFT,
    UNREADABLE,
    Batch,
    DataConfig,
    Tally,
    random_square,
    read_images,
    training_batches,
)  # fmt: skip
from clipfast.data.sources import FromFile, Sample, Shards, Source, from_arrays, read_folder, read_table

__all__ = [
    "DRAFT", "UNREADABLE", "Batch", "DataConfig", "FromFile", "Sample", "Shards", "Source", "Tally", "from_arrays",
    "random_square", "read_folder", "read_images", "read_table", "training_batches",
]  # fmt: skip
