"""Single transforms: hand-worked values and refusals."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import infalign as ia


def test_hand_worked_values():
    assert ia.Exponential(math.log(3.0))(0.5) == pytest.approx((math.sqrt(3) - 1) / 2, abs=1e-15)
    assert ia.Exponential(-math.log(4.0))(0.5) == pytest.approx(2 / 3, abs=1e-15)
    assert ia.Log()(math.exp(-2.0)) == pytest.approx(-2.0)
    assert ia.Log()(0.0) == -np.inf
    assert ia.Identity().log_partition(0.5) == pytest.approx(math.log(0.5 * (math.exp(2.0) - 1.0)), abs=1e-14)
    assert ia.Log().log_partition(0.5) == pytest.approx(math.log(1 / 3), abs=1e-14)


@given(t=st.floats(-5000, 5000), u=st.floats(0, 1))
def test_exponential_stays_between_the_corners_and_mirrors(t, u):
    value = float(ia.Exponential(t)(u))
    assert 0.0 <= value <= 1.0
    assert value == pytest.approx(1.0 - float(ia.Exponential(-t)(1.0 - u)), abs=1e-9)


@given(t=st.floats(-1e-3, 1e-3), u=st.floats(0, 1))
def test_exponential_tends_to_the_identity(t, u):
    assert float(ia.Exponential(t)(u)) == pytest.approx(u + t * u * (u - 1) / 2, abs=1e-7)


def test_exponential_is_an_affine_image_of_the_papers():
    u, beta, t = np.linspace(0, 1, 9), 0.3, -4.0
    papers = np.sign(t) * np.exp(t * u) / (beta * abs(math.exp(t) - 1))
    ours = ia.Exponential(t)(u) / beta
    np.testing.assert_allclose(np.diff(ours), np.diff(papers), atol=1e-12)


def test_tabulated_goes_through_its_points_with_its_slopes():
    table = ia.Tabulated([0, 0.4, 1], [0, 1, 2], [1.0, 2.0, 0.5])
    np.testing.assert_allclose(table([0, 0.4, 1]), [0, 1, 2], atol=1e-15)
    step = 1e-6
    assert (table(0.4 + step) - table(0.4 - step)) / (2 * step) == pytest.approx(2.0, abs=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([0, 1], [1, 0]), "decrease"),
        (([0, 0.5, 0.5, 1], [0, 1, 2, 3]), "strictly"),
        (([0.1, 1], [0, 1]), "from 0 to 1"),
        (([0, 1], [0, np.inf]), "not finite"),
        (([0, 1], [0, 1, 2]), "one length"),
        (([0], [0]), "at least 2"),
        (([0, 1], [0, 1], [9, 0]), "slope"),
        (([0, 1], [0, 1], [-1, 0]), "slope"),
    ],
)
def test_tabulated_refuses_what_is_not_an_increasing_function(arguments, message):
    with pytest.raises(ia.InputError, match=message):
        ia.Tabulated(*arguments)


def test_refuses_an_infinite_exponent():
    with pytest.raises(ia.InputError, match="not a finite number"):
        ia.Exponential(math.inf)


@pytest.mark.parametrize(
    ("description", "message"),
    [
        ({"kind": "sigmoid"}, "unknown transform kind"),
        ({}, "unknown transform kind"),
        ({"kind": ["log"]}, "unknown transform kind"),
        ("log", "does not describe"),
        (None, "does not describe"),
        ({"kind": "exponential"}, "does not fit"),
        ({"kind": "identity", "t": 1}, "does not fit"),
        ({"kind": "exponential", "t": "steep"}, "not a finite number"),
    ],
)
def test_transform_from_dict_names_what_is_wrong(description, message):
    with pytest.raises(ia.InputError, match=message):
        ia.transform_from_dict(description)


@pytest.mark.parametrize("content", ["not json", "[]", '{"format": "else"}', '{"format": "infalign.transform"}'])
def test_load_refuses_other_files(tmp_path, content):
    path = tmp_path / "file.json"
    path.write_text(content)
    with pytest.raises(ia.InputError, match=r"file\.json"):
        ia.RewardTransform.load(path)


def test_load_names_the_file_that_holds_no_increasing_function(tmp_path):
    path = tmp_path / "file.json"
    content = '{"kind": "tabulated", "u": [0, 1], "value": [1, 0]}'
    path.write_text(f'{{"format": "infalign.transform", "version": 1, "transform": {content}}}')
    with pytest.raises(ia.InputError, match=r"file\.json.*decrease"):
        ia.RewardTransform.load(path)


def test_notes_that_json_cannot_hold_are_refused_and_nothing_is_written(tmp_path):
    for note in (object(), math.nan):
        with pytest.raises(ia.InputError, match="JSON-ready"):
            ia.Identity().save(tmp_path / "file.json", about={"note": note})
    assert not list(tmp_path.iterdir())


def test_a_table_cannot_be_changed():
    table = ia.Tabulated([0, 1], [0, 1])
    with pytest.raises(AttributeError):
        table.u = np.array([0.0, 1.0])
    with pytest.raises(ValueError, match="read-only"):
        table.value[0] = 5.0


def test_load_and_save_name_the_file_they_cannot_reach(tmp_path):
    with pytest.raises(ia.StorageError, match="missing"):
        ia.RewardTransform.load(tmp_path / "missing.json")
    with pytest.raises(ia.StorageError, match="missing"):
        ia.Identity().save(tmp_path / "missing" / "file.json")
