"""The tokenizer of a checkpoint, by the name that `load` takes."""

from __future__ import annotations

import os
from pathlib import Path

from clipfast import inputs
from clipfast.inputs.hf_tokenizer import TokenizeFunction
from clipfast.weights.folder import inner
from clipfast.weights.hub import URLS, hub_finder


def get_tokenizer(
    name: str | os.PathLike[str], context_length: int | None = None, download_root: str | None = None
) -> TokenizeFunction:
    """`tokenizer(texts, context_length) -> [B, L]`, as open_clip's; too long a text is cut.

    name: what `load` takes. Of a folder or `hf-hub:organisation/name` its files tell the tokenizer; OpenAI's is that of
      everything else, and of those whose files name no other.
    context_length: default the checkpoint's, else 77.
    download_root: where the Hugging Face hub's files are kept.

    Raises RuntimeError for an unknown name, OSError where a file is missing or cannot be had, ValueError naming a field of the
    configuration that cannot be done.
    """
    where = os.fspath(name)
    if where.startswith("hf-hub:"):
        find = hub_finder(where.removeprefix("hf-hub:"), download_root)
    elif os.path.isdir(where):
        find = inputs.in_folder(where)
    elif where in URLS or os.path.isfile(where):
        find = _nothing
    else:
        expected = f"a file, a folder, hf-hub:organisation/name, or one of {', '.join(URLS)}"
        raise RuntimeError(f"model {where!r} not found: expected {expected}")
    at, find = inner(where, find)
    return inputs.get_tokenizer(at, context_length, find=find, hub=lambda other: hub_finder(other, download_root))


def _nothing(file: str) -> Path | None:
    return None
