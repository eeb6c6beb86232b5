"""The limit shown beside a measurement where rewards tie."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

import infalign as ia
from infalign.evaluation.frontier import frontier
from infalign.evaluation.measure import measure
from infalign.evaluation.results import MethodResult
from infalign.evaluation.tied_limit import limit_at, ref_levels, tie_notes

BEST = ia.BestOfN(16)


def measured(levels, seed=0):
    """A policy that tilts towards high rewards, on rewards with that many levels; continuous ones if None."""
    rng = np.random.default_rng(seed)

    def draw(u):
        return u if levels is None else np.floor(levels * u)

    ours, theirs = draw(rng.random((20, 16)) ** 0.5), draw(rng.random((20, 32)))
    return measure("policy", ours, theirs, rng.normal(0.2, 0.05, size=(20, 16)), [ia.Standard(), BEST])


def test_four_levels_and_best_of_16_are_not_judged_by_the_continuous_limit():
    entry = measured(4).of("Best-of-16")
    assert entry.limit_without_ties == pytest.approx(float(ia.limit(BEST, measured(4).kl.estimate)), abs=1e-9)
    assert entry.limit_without_ties > 0.9
    assert 0.5 < entry.limit < 0.53
    assert entry.tied_limit is not None
    assert entry.tied_limit.win_rates[0] == pytest.approx(0.5, abs=1e-9)
    assert max(entry.tied_limit.win_rates) < 0.53


def test_without_ties_nothing_changes():
    for entry in measured(None).procedures:
        assert entry.tied_limit is None
        assert entry.limit == entry.limit_without_ties
    assert ref_levels(np.random.default_rng(0).random((5, 8))) is None


def test_the_limit_at_a_measured_kl_is_that_of_the_levels():
    levels = ref_levels(np.random.default_rng(1).integers(0, 5, size=(30, 16)).astype(float))
    at = limit_at(BEST, 0.4, levels)
    low, value, high = ia.limit(BEST, [0.399, 0.4, 0.401], levels=levels)
    assert at.win_rate == pytest.approx(float(value), abs=1e-9)
    assert at.slope == pytest.approx(float(high - low) / 0.002, abs=2e-3)


def test_it_is_stored_read_and_drawn():
    result = measured(4)
    assert MethodResult.from_dict(json.loads(json.dumps(result.to_dict()))) == result
    curve = frontier([result], "Best-of-16")
    assert curve.limit_with_ties
    assert max(curve.limit_win_rates) < 0.53
    assert not frontier([measured(None)], "Best-of-16").limit_with_ties


def test_the_reader_is_told_and_warned_where_the_levels_are_not_known():
    result = measured(4)
    (note,) = tie_notes([result], ["Best-of-16"])
    assert "without ties it would be up to" in note
    # An evaluation stored before ties were taken into account.
    old = replace(
        result,
        procedures=[replace(entry, limit_without_ties=None, tied_limit=None) for entry in result.procedures],
    )
    (note,) = tie_notes([old], ["Best-of-16"])
    assert "may be far too high" in note
    assert tie_notes([measured(None)], ["Best-of-16"]) == []
