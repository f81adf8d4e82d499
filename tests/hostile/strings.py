"""Strings against OpenAI's tokenizer (the package clip-anytorch): the same tokens, or the same kind of error."""

from __future__ import annotations

import importlib.util
import random
from pathlib import Path
from typing import Any

from clipfast import tokenize
from clipfast.inputs.tokenizer import default_tokenizer
from tests.hostile.harness import READERS, Attempt

WORDS = (Path(__file__).parents[2] / "LICENSE").read_text(encoding="utf-8").split()
WORDS += ["it's", "we'll", "DON'T", "a1b2", "ÅNGSTRÖM", "straße"]
ODD = (
    *("<|startoftext|>", "<|endoftext|>", "<|ENDOFTEXT|>", "</w>", "&amp;amp;", "&lt;", "&#x41;", "&#0;", "&notit;", "&AMP"),
    *("\u200b", "\u200d", "\ufeff", "\u2028", "\u0085", "\x00", "\x1b[0m", "\x7f", "\t", "\r\n", "\xa0", "\u3000", "\ufffd"),
    *("â€™", "Ã©", "ï»¿", "ÃƒÂ©", "\U0001f468\u200d\U0001f469", "🇩🇪", "e\u0301\u0301\u0301", "İ", "ß", "ﬁ", "Σς"),
    *("\u202e", "\u0600", "ا", "日本語", "한국어", "ไทย", "\ud800", "\udfff", "'S", "’ve", "''", "__", "½", "①", "𝕏", "٣"),
)  # fmt: skip
PLANES = (
    *((0, 0x80), (0, 0x80), (0x80, 0x250), (0x250, 0x800), (0x800, 0x3000), (0x3000, 0xD800)),
    *((0xE000, 0x10000), (0x10000, 0x110000)),
)


def text_of(rng: random.Random) -> str:
    def piece() -> str:
        kind = rng.random()
        if kind < 0.45:
            return rng.choice(WORDS)
        if kind < 0.6:
            return rng.choice(ODD)
        if kind < 0.65:
            return rng.choice(ODD) * rng.randrange(1, 30)
        low, high = rng.choice(PLANES)
        letters = "".join(chr(rng.randrange(low, high)) for _ in range(rng.randrange(1, 10)))
        if kind < 0.7:  # a text that was decoded wrongly
            return letters.encode("utf-8", "replace").decode(rng.choice(("latin-1", "cp1252", "cp437", "utf-16-le")), "replace")
        return letters if kind < 0.9 else rng.choice((str.upper, str.lower, str.title, str.swapcase))(letters)

    joint = rng.choice((" ", " ", " ", "", "  ", "\n"))
    return joint.join(piece() for _ in range(rng.choice((0, 1, 1, 1, 2, 2, 3, 5, 8, 8, 20))))


def openais() -> Any:
    """OpenAI's tokenizer, of its file alone: what stands beside it wants packages of its own."""
    path = Path(importlib.util.find_spec("clip").submodule_search_locations[0]) / "simple_tokenizer.py"  # type: ignore
    spec = importlib.util.spec_from_file_location("openais_simple_tokenizer", path)
    module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
    spec.loader.exec_module(module)  # type: ignore[union-attr]
    return module.SimpleTokenizer()


def prepare(folder: Path) -> Attempt:
    ours, theirs = default_tokenizer(), openais()
    start, end = (theirs.encoder[f"<|{name}oftext|>"] for name in ("start", "end"))

    def attempt(rng: random.Random) -> str:
        if len(theirs.cache) > 200_000:
            theirs.cache = {f"<|{name}oftext|>": f"<|{name}oftext|>" for name in ("start", "end")}
        for _ in range(READERS["strings"][0]):
            text = text_of(rng)
            expected, got = _tokens(theirs, text), _tokens(ours, text)
            if expected != got:
                return f"{text!r}: expected {expected}, got {got}"
        if isinstance(expected, list):  # of the last one also the row
            row = [start, *expected, end]
            row = row[:76] + [end] if len(row) > 77 else row + [0] * (77 - len(row))
            if tokenize(text, truncate=True)[0].tolist() != row:
                return f"{text!r}: expected {row}, got {tokenize(text, truncate=True)[0].tolist()}"
        return ""

    return attempt


def _tokens(tokenizer: object, text: str) -> list[int] | str:
    try:
        return tokenizer.encode(text)  # type: ignore[attr-defined]
    except Exception as error:
        return type(error).__name__
