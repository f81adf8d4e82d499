"""Shares of harmful labels by attribute, for two designs of the classes."""

import json

import numpy as np
import pandas
import pytest
import torch
from scipy.stats import binomtest

from clipfast.evaluate import metrics
from clipfast.evaluate.bias import bias, labelled

NAMES = ["man", "woman", "thief", "criminal", "gorilla"]
GROUPS = {"crime-related": ["thief", "criminal"], "non-human": ["gorilla"]}


def people(rows=300):
    rng = np.random.default_rng(0)
    ages = rng.choice(["0-2", "3-9", "20-29", None], rows)
    plain = rng.choice(NAMES, rows)
    with_child = np.where((ages == "0-2") | (ages == "3-9"), "child", plain)
    return {"plain": plain, "with child": with_child}, {"age": ages, "sex": rng.choice(["f", "m"], rows)}


def test_shares_are_those_of_a_cross_table():
    predictions, attributes = people()
    found = bias(predictions, GROUPS, attributes)
    for design, labels in predictions.items():
        for group, members in GROUPS.items():
            hit = pandas.Series(np.isin(labels, members))
            own = {(s.attribute, s.value): s for s in found.shares if (s.design, s.group) == (design, group)}
            for attribute, values in attributes.items():
                expected = hit.groupby(pandas.Series(values, dtype=object)).agg(["sum", "count"])
                assert {value for name, value in own if name == attribute} == set(expected.index)
                for value, (hits, images) in expected.iterrows():
                    share = own[attribute, value]
                    assert (share.hits, share.images) == (hits, images) and share.share == hits / images
                    assert share.interval == tuple(binomtest(int(hits), int(images)).proportion_ci(0.95))
            assert own["all", "all"].hits == hit.sum() and own["all", "all"].images == 300
    shares = {s[:4]: s.share for s in found.shares}
    assert shares["with child", "crime-related", "age", "0-2"] == 0 < shares["plain", "crime-related", "age", "0-2"]
    assert len(json.loads(json.dumps(found.summary()))) == len(found.shares) == 2 * 2 * (1 + 3 + 2)


def test_the_table_has_the_designs_side_by_side():
    predictions = {"plain": ["thief", "man", "man", "man"], "other": ["man"] * 4}
    lines = bias(predictions, {"crime": ["thief"]}, {"sex": ["f", "f", "m", "m"]}).table().splitlines()
    assert [line.split() for line in lines] == [
        ["crime", "crime"],
        ["plain", "other"],
        ["all", "all", "4", "25.0%", "0.0%"],
        ["sex", "f", "2", "50.0%", "0.0%"],
        ["sex", "m", "2", "0.0%", "0.0%"],
    ]


@pytest.mark.parametrize("scores_at_a_time", [1, 1 << 24])
def test_labels_are_those_of_the_highest_score(monkeypatch, scores_at_a_time):
    monkeypatch.setattr(metrics, "SCORES", scores_at_a_time)
    features = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    assert labelled(features, torch.eye(2), ["a", "b"]).tolist() == ["a", "b", "a"]


def test_bad_input_is_one_clear_line():
    predictions, attributes = people(20)
    for call, message in (
        (lambda: bias(predictions, GROUPS, {"age": attributes["age"][:5]}), "rows of age as of the first design, got 5 and 20"),
        (lambda: bias({}, GROUPS, attributes), "got 0 designs and 2 groups"),
        (lambda: bias({"plain": []}, GROUPS, {}), "predictions of plain with 1 dimension"),
        (lambda: labelled(torch.ones(1, 2), torch.ones(2, 2), ["a"]), "each of 2 rows of weights, got 1"),
        (lambda: labelled(torch.full((1, 2), torch.nan), torch.ones(1, 2), ["a"]), "finite features"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
