"""The whole program in seconds on drawings made here, killed and started again; and the sets, on what is known about them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import clipfast
from demo import emoji
from demo.emoji import Concept, Drawings
from paper import __main__ as program
from paper import data, icons, models, verdicts
from paper.models import KINDS, MAIN, Clock
from tests.demo.test_emoji import archive

SUBGROUPS = ("animal-bird", "animal-mammal", "food-fruit", "drink", "person-role")
GROUP_OF = {"animal": "animals-nature", "food": "food-drink", "drink": "food-drink", "person": "people-body"}


def concepts() -> list[Concept]:
    """Sixty: twelve of each subgroup; of the persons every third is a man, a woman, a boy."""
    found = []
    for number in range(60):
        subgroup = SUBGROUPS[number % 5]
        who = ("man ", "woman ", "boy ")[number // 5 % 3] if subgroup == "person-role" else ""
        label = f"{who}{'abcdefghij'[number % 10]} {'klmnopqrst'[number // 10]}"
        found.append(Concept(str(number), label, (), GROUP_OF[subgroup.split("-")[0]], subgroup, label, number % 20 == 19))
    return found


def drawn(told: list[Concept], styles: list[str], keep) -> Drawings:
    """A block of the concept's colour; its subgroup is the block's place, its style the size."""
    pixels, numbers, own = [], [], []
    for place, style in enumerate(styles):
        for number, concept in enumerate(told):
            if keep(concept):
                rgba = torch.zeros(64, 64, 4, dtype=torch.uint8)
                corner, side = 8 * SUBGROUPS.index(concept.subgroup), 20 + place
                colour = torch.tensor([number * 4, 255 - number * 4, number * 37 % 256, 255])
                rgba[corner : corner + side, corner : corner + side] = colour
                pixels.append(rgba)
                numbers.append(number)
                own.append(style)
    return Drawings(torch.stack(pixels), torch.tensor(numbers), own, told)


@pytest.fixture(scope="module")
def world() -> data.World:
    told = concepts()
    learned = drawn(told, ["noto", "twemoji", "emojione", "mdi", "tabler"], lambda own: not own.unseen)
    unseen = drawn(told, [*data.UNSEEN, icons.UNSEEN_SET], lambda own: True)
    ink, numbers = data.digits()
    strokes = Drawings(ink[:100], torch.full((100,), -1), ["digits"] * 100, told)
    return data.world(learned, data.join([unseen, strokes, learned], told), numbers[:100])


TINY = {"batch_size": 8, "progress": False}


def test_the_whole_program_goes_on_where_it_was_killed(world, tmp_path, monkeypatch):
    work = tmp_path / "work"
    work.mkdir()
    made, count = models.made, iter(range(99))

    def killed(*given, **options):
        if next(count) == 2:
            raise KeyboardInterrupt
        return made(*given, **options)

    def start() -> list:
        clock = Clock(work / "clock.json", float(program.LONG))
        return program.run(world, work, tmp_path, clock, "whose <drawings>", **TINY, steps=8, asked=10)

    monkeypatch.setattr(models, "made", killed)
    monkeypatch.setattr(models, "REPEATED", ("width 8",))
    monkeypatch.setattr(program, "STEPS", 3)
    monkeypatch.setattr(verdicts, "DRAWS", 50)
    for name, kind in KINDS.items():
        monkeypatch.setitem(KINDS, name, kind._replace(width=8 if name == "width 24" else 4))
    with pytest.raises(KeyboardInterrupt):
        start()
    before = {path: path.stat().st_mtime_ns for path in work.rglob("done.json")}
    assert len(before) == 2 and not (tmp_path / "paper.html").exists()
    told = start()
    assert all(path.stat().st_mtime_ns == then for path, then in before.items())
    assert {own.figure for own in told} >= {"2", "4", "5", "8", "9", "10", "13", "14", "17", "table 7", "MNIST"}
    html = (tmp_path / "paper.html").read_text(encoding="utf-8")
    assert "whose &lt;drawings&gt;" in html and html.count("<svg") >= 8
    assert all(html.count(program.page.escape(own.here)) >= 2 for own in told)  # in the summary, and at its figure
    kept = json.loads((tmp_path / "paper.json").read_text())
    assert kept["left_out"] == [] and [*kept["models"]][:7] == [*models.ORDER] and [*kept["models"]][7:] == ["width 8, seed 1"]
    both = [clipfast.load(str(work / "models" / run / "model.pt"), "cpu")[0].visual for run in models.runs("width 8", 2)]
    assert not torch.equal(both[0].conv1.weight, both[1].conv1.weight) and "over seeds too" in html
    assert "4 sizes, 5 runs" in next(own.here for own in told if own.figure == "9")
    assert all(row["steps"] == 8 for row in kept["models"].values())
    assert kept["models"]["width 24"]["flops"] > 1.5 * kept["models"][MAIN]["flops"]
    curve = json.loads((work / "models" / "predicts captions" / "curve.json").read_text())
    assert [*curve] == ["8", "16", "32", "64"] and all(len(hits) == 10 for hits in curve.values())
    files = {path: path.stat().st_mtime_ns for path in (work / "results").iterdir()}
    assert [own.agrees for own in start()] == [own.agrees for own in told]  # all is there
    assert files == {path: path.stat().st_mtime_ns for path in (work / "results").iterdir()}


def test_what_has_no_time_is_left_out(tmp_path):
    clock = Clock(tmp_path / "clock.json", 1.0)
    part = program.Parts(tmp_path / "results", clock, 10.0)
    assert part("first", lambda: {"a": 1}) == {"a": 1}
    clock = Clock(tmp_path / "clock.json", 1.0, before=55.0)
    clock.before = 55.0
    late = program.Parts(tmp_path / "results", clock, 10.0)
    assert late("first", lambda: 1 / 0) == {"a": 1} and late("second", lambda: 1 / 0) is None
    assert late.left_out == ["second"]


def test_the_sets_keep_training_and_test_apart(world):
    names = {task.name for task in world.tasks}
    assert names >= {"emoji names", "groups", "subgroups", "animals", "food", "digits", "emoji vendors", "icon sets"}
    fresh = len(world.pool.style) - len(world.learned.style)
    for task in world.tasks:
        assert not set(task.train[0]) & set(task.test[0]), task.name
        for rows, labels in (task.train, task.test):
            assert len(rows) == len(labels) and set(labels) <= set(range(len(task.classes)))
        if task.name not in ("emoji vendors", "icon sets"):
            assert (task.test[0] < fresh).all(), task.name
    for name in ("groups", "subgroups", "animals"):
        task = next(own for own in world.tasks if own.name == name)
        families = [{world.concepts[world.pool.concept[row]].family for row in rows} for rows, _ in (task.train, task.test)]
        assert not families[0] & families[1]
    shift = world.shift
    for style, (rows, _) in shift.test.items():
        assert {world.pool.style[row] for row in rows} == {style}
    assert {world.pool.style[row] for row in shift.train[0]} == {shift.base}
    assert set(world.people["age"]) == {"adult", "child"} and set(world.people["gender"]) == {"man", "woman", "person"}


def test_main_colours():
    rgba = torch.zeros(5, 64, 64, 4, dtype=torch.uint8)
    for row, colour in enumerate([(255, 0, 0), (0, 200, 30), (30, 60, 250), (120, 120, 120)]):
        rgba[row, 10:50, 10:50] = torch.tensor([*colour, 255])
    rgba[4, :, :32], rgba[4, :, 32:] = torch.tensor([255, 0, 0, 255]), torch.tensor([0, 0, 255, 255])
    assert data.main_colours(rgba) == ["red", "green", "blue", "", ""]


def test_icons_are_named_rendered_and_joined(tmp_path):
    def package(name: str, icons_: list[str]) -> None:
        body = {"icons": {own: {"body": f'<path d="M{n} 0h9v16z"/>'} for n, own in enumerate(icons_)}}
        archive(tmp_path, f"@iconify-json/{name}", icons.SETS[name][0], {"icons.json": body})

    for name in icons.SETS:
        package(name, ["heart"] if name != "mdi" else ["heart", "piggy-bank", "arrow-7", "heart-outline", "bank-of-many-words"])
    package("tabler", ["piggy-bank", "only-here", "ghost"])
    package("lucide", ["ghost", "heart"])
    package(icons.UNSEEN_SET, ["piggy-bank", "heart", "nobody-else"])
    icons.prepare(tmp_path)
    told = [Concept("1", "heart", (), "g", "s", "heart", False), Concept("2", "ghost", (), "g", "s", "ghost", True)]
    learned, unseen = icons.load(told, tmp_path)
    drawn = {(learned.style[row], learned.concepts[own].label) for row, own in enumerate(learned.concept.tolist())}
    assert ("mdi", "piggy bank") in drawn and ("tabler", "piggy bank") in drawn
    assert {label for _, label in drawn} == {"heart", "piggy bank"}  # no ghost, which is unseen; nothing of one set alone
    assert not {style for style, _ in drawn} & {icons.UNSEEN_SET} and set(unseen.style) == {icons.UNSEEN_SET}
    assert sorted(unseen.concepts[own].label for own in unseen.concept.tolist()) == ["heart", "piggy bank"]
    assert unseen.concept.min() == 0 and learned.concepts[0] is told[0]
    note = (tmp_path / "icons" / "ATTRIBUTION.txt").read_text()
    assert all(f"@iconify-json/{name}" in note for name in icons.SETS)
    assert int(learned.rgba[0, ..., 3].max()) == 255 and learned.rgba.shape[1:] == (emoji.SIZE, emoji.SIZE, 4)


def test_a_bad_option_is_one_line(capsys, tmp_path: Path):
    assert program.main(["--minutes", "0", "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == "paper: error: expected --minutes above 0, got 0.0\n"
    assert not (tmp_path / "out").exists()
