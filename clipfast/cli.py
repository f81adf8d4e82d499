"""The command line: `clipfast train | eval | suite | classify | embed | export | info | check`.

The fields of a command's dataclasses are its flags.
"""

from __future__ import annotations

import argparse
import csv
import json
import logging
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import torch

from clipfast.check import report
from clipfast.data import UNREADABLE, DataConfig, FromFile, Source, Tally, training_batches
from clipfast.evaluate import TEMPLATES, classify, embed, retrieval_source, zero_shot_source
from clipfast.evaluate.classifiers import classifier_source
from clipfast.evaluate.command import Measure, SuiteOptions, by_head, measure, suite_of
from clipfast.evaluate.datasets import tars_at
from clipfast.files import output_folder, parsed, read_parsed, replacing, shown
from clipfast.info import info
from clipfast.inputs import Preprocess, read_image
from clipfast.model import CLIP
from clipfast.train import TrainConfig, new_model, train
from clipfast.train.job import Job, joined, place
from clipfast.weights import LAYOUTS, export, load

USER_ERRORS = (*UNREADABLE, TypeError, RuntimeError, ArithmeticError, ImportError, MemoryError, csv.Error)
LONG = 7 * 24 * 3600  # seconds that a rank waits for another's last shard; of one that died torchrun tells the others
OTHERS = ("probe", "few-shot", "overlap", "bias", "robustness")  # tasks of clipfast.evaluate.command
Name = Annotated[str, "published model, hf-hub:... or path of a checkpoint"]
Device = Annotated[str, "cpu, cuda, ...; default: cuda if there is one"]
BatchSize = Annotated[int, "images at a time"]


@dataclass
class Classify:
    image: Annotated[str, "image file"]
    texts: Annotated[list[str], "captions to choose among; none with --head"]
    head: Annotated[str, "folder of a probe's head, as eval --task probe --out writes it, in the place of captions"] = ""
    model: Name = "ViT-B/32"
    device: Device = ""


@dataclass
class Eval:
    model: Name = "ViT-B/32"
    task: Annotated[
        str,
        "zero-shot, probe, few-shot, retrieval, overlap, bias, robustness (of a table), or classify: a"
        " classifier of timm's, or a file of MMPretrain's",
    ] = "zero-shot"
    checkpoint: Annotated[str, "file or folder of weights, in the place of model"] = ""
    classes: Annotated[str, "file of class names, a line each, in the order of .cls; 'folder<tab>name' where they differ"] = ""
    templates: Annotated[
        str, "file of prompts, a line each, with {} where the name goes; or .json; of retrieval one, for the captions"
    ] = ""
    out: Annotated[str, "folder to write results.json to"] = ""
    batch_size: BatchSize = 64
    device: Device = ""


@dataclass
class Embed:
    out: Annotated[str, "folder for the vectors (img_emb/, text_emb/, ...) and what they are of (metadata/)"]
    features: Annotated[
        str,
        "image, text, and hidden (of images, before the projection), joined by commas; of a table without images text, with"
        " --image-column caption",
    ] = "image"
    format: Annotated[
        str,
        "npy (metadata .jsonl), clip-retrieval (metadata .parquet, as its index and back-end read them) or parquet (vectors"
        " and all)",
    ] = "npy"
    refresh: Annotated[bool, "take over another content of the data, making only what changed"] = False
    model: Name = "ViT-B/32"
    dtype: Annotated[str, "float32 or float16"] = "float32"
    part_size: Annotated[int, "samples in a file at most; a shard begins another"] = 4096
    batch_size: BatchSize = 64
    device: Device = ""


@dataclass
class Check:
    device: Device = ""
    again: Annotated[bool, "also what passed before on this machine"] = False


@dataclass
class Validation:
    val_data: Annotated[str, "what is validated on every val_every updates, as DATA"] = ""
    val_task: Annotated[str, "zero-shot or retrieval"] = "zero-shot"
    val_classes: Annotated[str, "file of class names, as eval's"] = ""
    val_templates: Annotated[str, "file of prompts, as eval's"] = ""


@dataclass
class Export:
    model: Name
    out: Annotated[str, "file (openai, safetensors) or folder (open_clip, transformers) to write"]
    layout: Annotated[str, f"whose library is to load it: {', '.join(LAYOUTS)}"] = "safetensors"


def run_train(data: DataConfig, config: TrainConfig, validation: Validation) -> None:
    """Train a model on pairs: alone, or on every process that torchrun starts. @FILE.toml in place of options reads them."""
    model = new_model(config)
    rank, world = place()
    options: dict[str, Any] = {"context_length": model.context_length, "seed": config.seed, "rank": rank, "world": world}
    batches = training_batches(data, model.visual.input_resolution, config.batch_size, **options)
    if bool(validation.val_data) != bool(config.val_every):
        raise ValueError(f"expected val_data and val_every together, got {validation.val_data!r} and {config.val_every}")
    done = train(config, batches, model, validate=_validate(data, validation) if config.val_every else None)
    if rank == 0:
        print(f"{done.steps} steps in {done.seconds:.0f} s: {Path(config.out, 'model.pt')}")
        if done.stopped:
            print(f"stopped by {done.stopped}: go on with --resume auto")


def _validate(data: DataConfig, options: Validation) -> Callable[[CLIP, Job], dict[str, float]]:
    source = replace(data, data=options.val_data).open()
    measure = _measure(options.val_task, options.val_classes, options.val_templates)

    def validate(model: CLIP, job: Job) -> dict[str, float]:
        return measure(model, model.visual.preprocess, source, job=job, threads=data.workers, tally=Tally(data.max_bad))

    return validate


def _measure(task: str, classes: str, templates: str) -> Callable[..., dict[str, float]]:
    if task not in ("zero-shot", "retrieval"):
        raise ValueError(f"expected --task zero-shot, retrieval, classify, {', '.join(OTHERS)}, got {task!r}")
    if task == "retrieval":
        frames = _lines(templates) or ["{}"]
        if len(frames) > 1:
            raise ValueError(f"{templates}: expected one template for the captions of retrieval, got {len(frames)}")
        return partial(retrieval_source, template=frames[0])
    named = {folder: name or folder for folder, _, name in (line.partition("\t") for line in _lines(classes))}
    return partial(zero_shot_source, classes=named, templates=_lines(templates) or TEMPLATES)


def _load_to_read(name: str, device: str) -> tuple[CLIP, Preprocess]:
    """``load``, and the model as ``for_inference`` gives it: a ResNet takes three quarters of the time."""
    model, preprocess = load(name, device or None)
    return model.for_inference(), preprocess


def run_eval(data: DataConfig, options: Eval, asked: Measure) -> None:
    """Measure a model or a classifier, alone or on every process that torchrun starts; MODEL... --suite FILE.toml measures
    several on a suite of data sets."""
    with joined(options.device or "auto", timeout=LONG) as job:
        results = _evaluated(data, options, asked, job)
    if job.rank:
        return
    for key, value in results.items():
        if isinstance(value, list | dict | None):
            continue  # printed as a table, or for results.json alone
        form = "8.3g" if key == "penalty" else "8.2%" if isinstance(value, float) else "6"  # all others are shares
        print(f"{shown(key):20} {value:{form}}")
    if options.out:
        with output_folder(options.out) as folder, replacing(folder / "results.json") as file:
            file.write(json.dumps({"task": options.task, "model": options.checkpoint or options.model, "data": data.data}
                                  | results, indent=1).encode())  # fmt: skip


def _evaluated(data: DataConfig, options: Eval, asked: Measure, job: Job) -> dict[str, Any]:
    name, load_it = options.checkpoint or options.model, partial(_load_to_read, device=str(job.device))
    reading = {"batch_size": options.batch_size, "threads": data.workers, "tally": Tally(data.max_bad)}
    if options.task == "classify":
        return _classifier(name, data.open(), options, reading)
    plain = options.task == "retrieval" or (asked == Measure() and not options.templates.endswith(".json"))
    if options.task in OTHERS or asked.features or not plain:
        return measure(name, options.task, data, asked, load_it, options.classes, options.templates, options.out, reading, job)
    score, source = _measure(options.task, options.classes, options.templates), data.open()
    return score(*load_it(name), source, job=job, **reading)


def _classifier(name: str, source: Source, options: Eval, reading: dict[str, Any]) -> dict[str, float]:
    from clipfast.interop.timm_classifiers import class_names, load_classifier

    model, preprocess = load_classifier(name, options.device or None)
    named = [line.partition("\t")[0] for line in _lines(options.classes)]
    return classifier_source(model, preprocess, source, named or class_names(model), **reading)


def run_suite(options: SuiteOptions) -> None:
    """Measure several models on a suite of data sets; what is there already is not made again."""
    with joined(options.device or "auto", timeout=LONG) as job:
        suite_of(options, partial(_load_to_read, device=str(job.device)), {"batch_size": options.batch_size}, job)


def run_classify(options: Classify) -> None:
    """Print how probable each text, or each class of a probe's head, is for an image."""
    if bool(options.texts) == bool(options.head):
        raise ValueError(f"expected captions or --head, one of them, got {len(options.texts)} captions and {options.head!r}")
    if options.head:
        for probability, text in by_head(
            options.head, options.model, options.image, partial(_load_to_read, device=options.device)
        ):
            print(f"{probability:7.2%}  {shown(text)}")
        return
    image = read_image(options.image)
    model, preprocess = load(options.model, options.device or None)
    probabilities = classify(model, preprocess(image)[None], options.texts)[0].tolist()
    for probability, text in sorted(zip(probabilities, options.texts, strict=True), reverse=True):
        print(f"{probability:7.2%}  {shown(text)}")


def run_embed(data: DataConfig, options: Embed) -> None:
    """Write the vectors of a folder, a table or shards, alone or on every process that torchrun starts; a second call goes on
    where the first was interrupted."""
    with joined(options.device or "auto", timeout=LONG) as job:
        if "://" in data.data and ".tar" not in data.data:  # a folder of shards far away
            data = replace(data, data="::".join(tars_at(data.data)))
        source = data.open()
        model, preprocess = _load_to_read(options.model, str(job.device))
        parts = embed(
            model,
            preprocess,
            source,
            options.out,
            features=options.features.split(","),
            dtype=options.dtype,
            part_size=options.part_size,
            form=options.format,
            refresh=options.refresh,
            job=job,
            batch_size=options.batch_size,
            threads=data.workers,
            tally=Tally(data.max_bad),
        )
    if job.rank == 0:
        print(f"{parts} parts in {options.out}")


def run_export(options: Export) -> None:
    """Write a model for another library."""
    model, _ = load(options.model, "cpu")
    print(export(model, options.out, options.layout))


def run_info() -> None:
    """Show versions, the build, and which backend each op takes and why."""
    print(info())


def run_check(options: Check) -> int:
    """Hold every op and backend against its definition on this device, and time it; exit code 1 if one is wrong."""
    return report(options.device or ("cuda" if torch.cuda.is_available() else "cpu"), options.again)


COMMANDS: dict[str, Callable[..., int | None]] = {
    "train": run_train,
    "eval": run_eval,
    "suite": run_suite,
    "classify": run_classify,
    "embed": run_embed,
    "export": run_export,
    "info": run_info,
    "check": run_check,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0, 1 for a wrong kernel, 2 for what the user can put right (one line on stderr), 130 when interrupted."""
    handler = logging.StreamHandler()
    handler.setFormatter(_OneLine("clipfast: %(message)s"))
    logging.basicConfig(handlers=[handler], level=logging.WARNING)
    parser, words = _parser(), [*map(str, sys.argv[1:] if arguments is None else arguments)]
    if words[:1] == ["eval"] and any(word.partition("=")[0] == "--suite" for word in words):
        words[0] = "suite"
    spelt, out_of_files = _from_files(words, parser)
    given = vars(parser.parse_args(spelt))
    for name, value in given.items():
        if isinstance(value, str) and value in out_of_files:
            given[name] = FromFile(value)
    command, debug = COMMANDS[given.pop("command")], given.pop("debug", False)
    kinds = [kind for name, kind in get_type_hints(command).items() if name != "return"]

    def work() -> int | None:
        return command(*(kind(**{f.name: given[f.name] for f in fields(kind) if f.name in given}) for kind in kinds))

    return exit_code("clipfast", debug, work)


def exit_code(program: str, debug: bool, work: Callable[[], int | None]) -> int:
    """What a program ends with: its own code, 2 for what the user can put right (one line on stderr), 130 when interrupted."""
    try:
        return work() or 0
    except USER_ERRORS as error:
        if debug:
            raise
        print(f"{program}: error: {_one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


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
            about |= {"nargs": "*", "default": []} if get_origin(type_) is list else {}
            parser.add_argument(field.name, **about)
            continue
        if field.default != "":
            about["help"] += f" (default: {field.default})"
        if type_ is bool:
            about["action"] = argparse.BooleanOptionalAction
        else:
            about |= {"type": type_ if type_ in (int, float, str) else _name_or_sizes, "metavar": field.name.upper()}
        parser.add_argument(f"--{field.name.replace('_', '-')}", **about)


def _from_files(arguments: Sequence[str], parser: argparse.ArgumentParser) -> tuple[list[str], set[str]]:
    """@FILE.toml -> the options in it, as if they had been given there; those behind it win. A key is an option's name.

    And the values that nobody has typed.
    """
    found, values = list[str](), set[str]()
    for argument in map(str, arguments):
        if not (argument.startswith("@") and argument.endswith(".toml")):
            found.append(argument)
            continue
        try:
            given = read_parsed(argument[1:], form="TOML")
        except (OSError, ValueError) as error:
            parser.error(_one_line(error))
        for name, value in given.items():
            alike = isinstance(value, str | int | float | dict)
            if not alike or not re.fullmatch(r"[\w-]+", name) or (name == "data" and str(value).startswith("-")):
                parser.error(f"{argument[1:]}: expected an option's name and its value, got {name!r:.60} = {value!r:.60}")
            flag = f"--{name.replace('_', '-')}"
            values.add(str(value))
            if name == "data":
                found.append(str(value))
            elif isinstance(value, bool):
                found.append(flag if value else f"--no-{flag[2:]}")
            else:
                found.append(f"{flag}={json.dumps(value, default=str) if isinstance(value, dict) else value}")
    return found, values


def _name_or_sizes(text: str) -> str | dict[str, Any]:
    try:
        return parsed(text, "the model's sizes") if text.startswith("{") else text
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


class _OneLine(logging.Formatter):
    """What is logged names keys and files of a stranger: they begin no line of their own, and steer no terminal."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return shown(super().formatMessage(record))


def _lines(path: str) -> list[str]:
    return [line for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()] if path else []


def _one_line(error: BaseException) -> str:
    """The message on one line, in which nothing steers the terminal; of a very long one (it may quote its input) both ends."""
    text = " ".join(str(error).split()) or ("not enough memory" if isinstance(error, MemoryError) else type(error).__name__)
    text = shown(text)
    return text if len(text) <= 600 else f"{text[:290]} [...] {text[-290:]}"


if __name__ == "__main__":
    sys.exit(main())
