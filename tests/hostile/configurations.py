"""Configurations of checkpoints and suites whose fields have other types and values: what a clean one gives, or one line."""

from __future__ import annotations

import copy
import json
import os
import random
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch

from clipfast import export, get_tokenizer, load
from clipfast.evaluate.probe import Head
from clipfast.evaluate.suite import Suite
from clipfast.inputs import Preprocess
from clipfast.model import CLIP
from tests.hostile.harness import Attempt, one_line
from tests.hostile.weights import SIZES

DEEP = "\ud800deep"  # stands for 10,000 lists in each other, which json.dumps could not write
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3, 7, 2**31, 2**63, 2**70, -(2**40), 0.5, -0.0, 1e308, float("nan"), float("inf")),
    *("", "0", "x", "../../etc/passwd", "/dev/zero", "a\0b", "\x1b[2J", "CLIPTokenizer", "gelu", "x" * 10_000, "\udc80"),
    *([], [0], [224], [224, 224], [1, 2, 3], [[[]]], ["x"], {}, {"a": {}}, {"content": 3}, {"eps": "x"}, DEEP),
)  # fmt: skip
FIELDS = ("x", "", "hf_tokenizer_name", "tokenizer_kwargs", "pool_type", "size", "mode")
SUITE = """standard = ["a"]
[compute]
a = 3.5
[[dataset]]
name = "x"
root = "r"
classes = ["a", "b"]
templates = "t.txt"
tasks = ["zero-shot", "probe"]
metric = "accuracy"
[[point]]
model = "m"
dataset = "x"
task = "probe"
score = 0.5
"""


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a tree of JSON, but for the entries of long lists and vocabularies."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, own in [*inner][:40] for place in places(own, (*path, key)))]


def changed(value: Any, rng: random.Random) -> Any:
    """The tree with one to three of its values replaced, taken away, renamed or put one deeper."""
    tree = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 2, 3))):
        *path, last = rng.choice(places(tree)) or (None,)
        if last is None:
            return rng.choice(VALUES) if rng.random() < 0.2 else tree
        home = tree
        for key in path:
            home = home[key]
        kind = rng.randrange(10)
        if kind == 0 and isinstance(home, dict):
            del home[last]
        elif kind == 1 and isinstance(home, dict):
            home[rng.choice((*FIELDS, f"{last}s"))] = home.pop(last)
        elif kind == 2:
            home[last] = [home[last]]
        elif kind == 3:
            home[last] = {"x": home[last]}
        elif kind == 4:
            home[last] = str(home[last])
        elif kind == 5 and isinstance(home[last], (int, float)) and not isinstance(home[last], bool):
            home[last] = home[last] * rng.choice((-1, 2, 0.5, 1000)) + rng.choice((0, 1))
        else:
            home[last] = rng.choice(VALUES)
    return tree


def prepare(folder: Path) -> Attempt:
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    os.environ["HF_HUB_OFFLINE"] = "1"
    model, whole = CLIP(**SIZES), folder / "whole"
    model.visual.preprocess = Preprocess(32, mean=(0.5,) * 3, std=(0.5,) * 3)
    for layout in ("open_clip", "transformers"):
        export(model, whole / layout, layout)
    shutil.copytree(whole / "transformers", whole / "sentence" / "0_CLIPModel")
    (whole / "sentence" / "modules.json").write_text(json.dumps([{"idx": 0, "path": "0_CLIPModel", "type": "x.CLIPModel"}]))
    _words(whole / "words")
    Head(torch.zeros(2, 3), torch.zeros(2), ["a", "b"], {"penalty": 1.0}).save(whole / "head")
    (whole / "suite").mkdir()
    (whole / "suite" / "suite.toml").write_text(SUITE)
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def attempt(rng: random.Random) -> str:
        name = rng.choice(sorted(path.name for path in whole.iterdir()))
        shutil.rmtree(work := folder / "work", ignore_errors=True)
        shutil.copytree(whole / name, work)
        files = [path for path in sorted(work.rglob("*.json")) if path.name not in ("vocab.json",)]
        before = sorted(folder.rglob("*"))
        if name == "suite":
            (work / "suite.toml").write_text(_toml(rng), encoding="utf-8", errors="surrogatepass")
        else:
            target = rng.choice(files)
            text = json.dumps(changed(json.loads(target.read_text()), rng)).replace(
                json.dumps(DEEP), "[" * 10_000 + "]" * 10_000
            )
            target.write_text(text)
        read = {"suite": lambda: Suite.read(work / "suite.toml"), "head": lambda: Head.load(work)}.get(
            name, lambda: load(work, "cpu")
        )
        for call in (read, lambda: get_tokenizer(work)(["a b", "c"])):
            try:
                got = call()
            except Exception as error:
                if what := one_line(error):
                    return f"{name}: {what}"
            else:
                if isinstance(got, tuple) and isinstance(got[0], CLIP):
                    state = got[0].state_dict()
                    if state.keys() != expected.keys() or not all(torch.equal(state[n], expected[n]) for n in state):
                        return f"{name}: other weights"
                    if got[1](torch.zeros(3, 9, 9, dtype=torch.uint8)).numel() > 1 << 26:
                        return f"{name}: a transform to {got[1].size}"
        return "" if sorted(folder.rglob("*")) == before else f"{name}: files were made"

    return attempt


def _words(path: Path) -> None:
    """A folder of a tokenizer of words, as open_clip names one beside its model."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    path.mkdir(parents=True)
    made = Tokenizer(WordLevel({"[PAD]": 0, "[UNK]": 1, "[SEP]": 2, "a": 3, "b": 4}, "[UNK]"))
    made.pre_tokenizer = Whitespace()
    made.save(str(path / "tokenizer.json"))
    text = {
        "context_length": 9,
        "hf_tokenizer_name": "org/words",
        "tokenizer_kwargs": {"strip_sep_token": True, "clean": "lower"},
    }
    (path / "open_clip_config.json").write_text(json.dumps({"model_cfg": {"text_cfg": text}}))
    told = {
        "tokenizer_class": "BertTokenizerFast",
        "pad_token": "[PAD]",
        "sep_token": {"content": "[SEP]"},
        "padding_side": "right",
    }
    told |= {
        "do_lower_case": True,
        "added_tokens_decoder": {"5": {"content": "new", "special": True}},
        "truncation_side": "right",
    }
    (path / "tokenizer_config.json").write_text(json.dumps(told))


def _toml(rng: random.Random) -> str:
    lines = SUITE.splitlines()
    for _ in range(rng.choice((1, 1, 2))):
        place = rng.randrange(len(lines))
        key = lines[place].partition(" = ")[0]
        value = rng.choice(
            ('""', "3", "[]", "[3]", "{}", "1979-05-27", "nan", "true", '"pipe:touch x"', "[" * 3000, '"\\u0000"', '"../.."')
        )
        lines[place] = rng.choice((f"{key} = {value}", f"{value} = {key}", "", f"[{key}]", lines[place] + lines[place], value))
    return "\n".join(lines)
