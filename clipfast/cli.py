"""The command line: `clipfast train | eval | classify | embed | info`. The fields of a command's dataclasses are its flags."""

from __future__ import annotations

import argparse
import csv
import json
import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from .data import UNREADABLE, DataConfig, Tally, training_batches
from .evaluate import TEMPLATES, classify, embed, retrieval_source, zero_shot_source
from .image import read_image
from .info import info
from .train import TrainConfig, sizes, train
from .weights import load

USER_ERRORS = (*UNREADABLE, TypeError, RuntimeError, ArithmeticError, ImportError, csv.Error)
Name = Annotated[str, "published model, hf-hub:... or path of a checkpoint"]
Device = Annotated[str, "cpu, cuda, ...; default: cuda if there is one"]
BatchSize = Annotated[int, "images at a time"]


@dataclass
class Classify:
    image: Annotated[str, "image file"]
    texts: Annotated[list[str], "captions to choose among"]
    model: Name = "ViT-B/32"
    device: Device = ""


@dataclass
class Eval:
    model: Name = "ViT-B/32"
    task: Annotated[str, "zero-shot or retrieval"] = "zero-shot"
    classes: Annotated[str, "file of class names, a line each, in the order of .cls; 'folder<tab>name' where they differ"] = ""
    templates: Annotated[str, "file of prompts, a line each, with {} where the name goes"] = ""
    batch_size: BatchSize = 64
    device: Device = ""


@dataclass
class Embed:
    out: Annotated[str, "folder for the vectors (part_*.npy) and their keys (part_*.jsonl)"]
    model: Name = "ViT-B/32"
    dtype: Annotated[str, "float32 or float16"] = "float32"
    part_size: Annotated[int, "samples in a file"] = 4096
    batch_size: BatchSize = 64
    device: Device = ""


def run_train(data: DataConfig, config: TrainConfig) -> None:
    """Train a model on pairs."""
    size = sizes(config.model)
    context = size["context_length"]
    batches = training_batches(data, size["image_resolution"], config.batch_size, context_length=context, seed=config.seed)
    done = train(config, batches)
    print(f"{done.steps} steps in {done.seconds:.0f} s: {Path(config.out, 'model.pt')}")


def run_eval(data: DataConfig, options: Eval) -> None:
    """Measure zero-shot accuracy or retrieval."""
    if options.task not in ("zero-shot", "retrieval"):
        raise ValueError(f"expected --task zero-shot or retrieval, got {options.task!r}")
    source = data.open()
    model, preprocess = load(options.model, options.device or None)
    reading = {"batch_size": options.batch_size, "threads": data.workers, "tally": Tally(data.max_bad)}
    if options.task == "retrieval":
        results = retrieval_source(model, preprocess, source, **reading)
    else:
        lines = [line.partition("\t") for line in _lines(options.classes)]
        classes = {folder: name or folder for folder, _, name in lines}
        results = zero_shot_source(model, preprocess, source, classes, _lines(options.templates) or TEMPLATES, **reading)
    for name, value in results.items():
        print(f"{name:20} {f'{value:8.2%}' if isinstance(value, float) else f'{value:6}'}")


def run_classify(options: Classify) -> None:
    """Print how probable each text is for an image."""
    image = read_image(options.image)
    model, preprocess = load(options.model, options.device or None)
    probabilities = classify(model, preprocess(image)[None], options.texts)[0].tolist()
    for probability, text in sorted(zip(probabilities, options.texts, strict=True), reverse=True):
        print(f"{probability:7.2%}  {text}")


def run_embed(data: DataConfig, options: Embed) -> None:
    """Write the image vectors of a folder, a table or shards; a second call goes on where the first was interrupted."""
    source = data.open()
    model, preprocess = load(options.model, options.device or None)
    parts = embed(
        model,
        preprocess,
        source,
        options.out,
        dtype=options.dtype,
        part_size=options.part_size,
        origin={"data": data.data, "model": options.model},
        batch_size=options.batch_size,
        threads=data.workers,
        tally=Tally(data.max_bad),
    )
    print(f"{parts} parts in {options.out}")


def run_info() -> None:
    """Show versions, the build, and which backend each op takes and why."""
    print(info())


COMMANDS: dict[str, Callable[..., None]] = {
    "train": run_train,
    "eval": run_eval,
    "classify": run_classify,
    "embed": run_embed,
    "info": run_info,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0, 2 for what the user can put right (one line on stderr), 130 when interrupted."""
    logging.basicConfig(format="clipfast: %(message)s", level=logging.WARNING)
    given = vars(_parser().parse_args(arguments))
    command, debug = COMMANDS[given.pop("command")], given.pop("debug", False)
    kinds = [kind for name, kind in get_type_hints(command).items() if name != "return"]
    try:
        command(*(kind(**{f.name: given[f.name] for f in fields(kind) if f.name in given}) for kind in kinds))
    except USER_ERRORS as error:
        if debug:
            raise
        print(f"clipfast: error: {_one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("clipfast", description="A CLIP engine.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, command in COMMANDS.items():
        sub = commands.add_parser(name, help=command.__doc__, description=command.__doc__, argument_default=argparse.SUPPRESS)
        sub.add_argument("--debug", action="store_true", help="show the traceback of an error")
        for parameter, kind in get_type_hints(command).items():
            if parameter != "return":
                _add_fields(sub, kind)
    return parser


def _add_fields(parser: argparse.ArgumentParser, kind: type) -> None:
    """A flag for each field of a dataclass; a field without a default is a positional argument."""
    hints = get_type_hints(kind, include_extras=True)
    for field in fields(kind):
        type_, text = get_args(hints[field.name])
        about: dict[str, Any] = {"help": text.replace("%", "%%")}
        if field.default is MISSING:
            about |= {"nargs": "+"} if get_origin(type_) is list else {}
            parser.add_argument(field.name, **about)
            continue
        if field.default != "":
            about["help"] += f" (default: {field.default})"
        if type_ is bool:
            about["action"] = argparse.BooleanOptionalAction
        else:
            about |= {"type": type_ if type_ in (int, float, str) else _name_or_sizes, "metavar": field.name.upper()}
        parser.add_argument(f"--{field.name.replace('_', '-')}", **about)


def _name_or_sizes(text: str) -> str | dict[str, Any]:
    return json.loads(text) if text.startswith("{") else text


def _lines(path: str) -> list[str]:
    return [line for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()] if path else []


def _one_line(error: BaseException) -> str:
    """The message on one line; of a very long one (it may quote its input) both ends."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 600 else f"{text[:290]} [...] {text[-290:]}"


if __name__ == "__main__":
    sys.exit(main())
