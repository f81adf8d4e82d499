"""Command lines and files of options that are malformed: exit code 0, or 2 with one line; and nothing is left outside OUT."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import random
import shutil
import stat
from pathlib import Path

import torch

from clipfast.cli import main
from clipfast.model import CLIP
from tests.data.test_data import png, write_shards, write_table
from tests.hostile.harness import Attempt
from tests.hostile.weights import SIZES

VALUES = (
    *("", "0", "1", "-1", "2", "1e9", "1e400", "nan", "inf", "-inf", "x", "true", "0x10", "1_0", "٣", "9" * 400, "1,2,,3"),
    *("\0", "\x1b]0;x\x07", "a\nb", "\udcff", "é" * 3000, "--", "-", "@", "@none.toml", "@deep.toml", "~", "`touch pwned`"),
    *("pipe:", "pipe:exit 3", "s", "s/{000..001}.tar", "s/{0..999999999999}.tar", "{{{", "}", "a{b,c", "*", "**/*", "[", "::"),
    *("photo.png", "rows.csv", "tiny.pt", "classes.txt", ".", "null", "/proc/none/x", "http://127.0.0.1:9/x.tar", "ViT-B/33"),
    *("hf-hub:", "hf-hub:a/b", "hf-hub:a/b@../../x", "{", "{}", '{"embed_dim": 16}', "[" * 9000, "{" + '"a":{' * 9000),
    *("zero-shot", "retrieval", "probe", "few-shot", "overlap", "bias", "robustness", "classify", "float16", "paper"),
)  # fmt: skip
FLAGS = ("model", "task", "data", "x", "help", "images", "max-bad", "device", "precision")
TRAIN = ["--steps", "1", "--batch-size", "4", "--workers", "0", "--out", "OUT", "--device", "cpu", "--lr", "1e-4"]
MODEL = SIZES | {"vocab_size": 49408}
WHOLE = {
    "classify": ["photo.png", "a dog", "a cat", "--model", "tiny.pt", "--device", "cpu"],
    "embed": ["s", "OUT", "--model", "tiny.pt", "--part-size", "3", "--batch-size", "2", "--workers", "1"],
    "eval": ["rows.csv", "--model", "tiny.pt", "--task", "retrieval", "--batch-size", "4", "--classes", "classes.txt"],
    "export": ["tiny.pt", "OUT", "--layout", "open_clip"],
    "suite": ["tiny.pt", "--suite", "suite.toml", "--out", "OUT", "--batch-size", "2"],
    "train": ["s", "--model", json.dumps(MODEL), *TRAIN, "--resume", "", "--no-tensorboard", "--no-progress"],
    "info": [],
}
BOUNDED = ("steps", "epochs", "max-seconds", "workers", "size", "micro", "shuffle", "seeds", "shots", "timeout", "streams")


def words_of(rng: random.Random, folder: Path) -> list[str]:
    """A good command line with one to three faults; options partly by a file of them."""
    command = rng.choice([*WHOLE])
    words = [command, *WHOLE[command]]
    if rng.random() < 0.3:
        lines = []
        while len(words) > 2 and words[-2].startswith("--"):
            lines.append((words[-2][2:], words[-1]))
            del words[-2:]
        text = "\n".join(f"{name.replace('-', '_')} = {_toml(value, rng)}" for name, value in lines)
        (folder / "options.toml").write_text(_spoilt(text, rng), encoding="utf-8", errors="surrogatepass")
        words.append("@options.toml")
    for _ in range(rng.choice((1, 1, 2, 3))):
        place, kind = rng.randrange(len(words) + 1), rng.randrange(6)
        if kind == 0 and place < len(words):
            del words[place]
        elif kind == 1:
            words.insert(place, rng.choice(VALUES))
        elif kind == 2:
            words.insert(place, f"--{rng.choice(FLAGS)}")
        elif kind == 3 and place < len(words):
            words[place] = words[place][: rng.randrange(len(words[place]) + 1)]
        elif place < len(words):
            words[place] = rng.choice(VALUES)
    return words


def _toml(value: str, rng: random.Random) -> str:
    return rng.choice((json.dumps(value), json.dumps(value), value or '""', f"[{json.dumps(value)}]", "true", "1979-05-27"))


def _spoilt(text: str, rng: random.Random) -> str:
    place = rng.randrange(len(text) + 1)
    return rng.choice(
        (text, text, text[:place], text[:place] + rng.choice(VALUES) + text[place:], f"[x]\n{text}", "x = " + "[" * 9000)
    )


def _endless(words: list[str]) -> bool:
    """Whether a train command has lost its bound, or asks for a size that takes as long as it says."""
    text = " ".join(words)
    large = any(char in text for char in ("1e9", "9" * 400)) and any(f"--{name}" in text for name in BOUNDED)
    return words[:1] == ["train"] and (large or "--steps 1 " not in f"{text} ") and "options.toml" not in text


def prepare(folder: Path) -> Attempt:
    os.chdir(folder)
    os.environ |= {"HF_HUB_OFFLINE": "1", "HOME": str(folder), "XDG_CACHE_HOME": str(folder / "cache")}
    torch.manual_seed(0)
    write_shards(folder / "s", shards=2, each=4)
    write_table(folder, 4)
    Path("pairs.csv").rename("rows.csv")
    Path("photo.png").write_bytes(png(1))
    Path("classes.txt").write_text("a\nb\n")
    Path("deep.toml").write_text("x = " + "[" * 9000)
    Path("suite.toml").write_text('[[dataset]]\nname = "x"\ntest = "s"\nclasses = ["a", "b"]\n')
    with contextlib.suppress(OSError):  # a device: only root makes one
        os.mknod("null", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    torch.save(
        {"state_dict": CLIP(**(SIZES | {"vocab_size": 49408})).state_dict(), "model_config": {"quick_gelu": True}}, "tiny.pt"
    )
    logging.disable(logging.ERROR)
    kept = {path.name for path in folder.iterdir()} | {"options.toml", "OUT", "cache", ".cache", "run"}

    def attempt(rng: random.Random) -> str:
        words = words_of(rng, folder)
        if _endless(words):
            return ""
        out, err = io.StringIO(), io.StringIO()
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                code = main(words)
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
        except MemoryError:
            raise
        except BaseException as error:  # noqa: BLE001 - whatever it is, it is a traceback to the user
            return f"{_shown(words)}: raised {type(error).__name__}: {str(error)[:300]}"
        finally:
            for name in ("OUT", "run", "suite"):
                shutil.rmtree(name, ignore_errors=True)
                Path(name).unlink() if Path(name).is_file() else None
        told = [line for line in err.getvalue().splitlines() if "error: " in line]
        if code not in (0, 2) or (code == 2 and len(told) != 1) or "Traceback" in err.getvalue():
            return f"{_shown(words)}: exit code {code}, {err.getvalue()[-300:]!r}"
        if left := {path.name for path in folder.iterdir()} - kept - {word.split("/")[0] for word in words}:
            for name in left:
                shutil.rmtree(name, ignore_errors=True)
            return f"{_shown(words)}: left {sorted(left)}"
        for path in folder.iterdir():  # an output that was named so
            if path.name not in kept:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        return ""

    return attempt


def _shown(words: list[str]) -> str:
    return " ".join(ascii(word[:80]) for word in words)
