"""What the display draws is what the report says, and the terminal's lines say what is wrong."""

from __future__ import annotations

import json

import numpy as np
import pytest
from matplotlib.figure import Figure

from infalign.calibration.report import CalibrationReport, calibration_report
from infalign.errors import InputError
from infalign.report.calibration_display import CalibrationDisplay, calibration_lines


@pytest.fixture(scope="module")
def report():
    rng = np.random.default_rng(0)
    return calibration_report(rng.gumbel(size=(80, 32)) + rng.normal(size=(80, 1)))


def test_it_draws_the_report(report, tmp_path):
    display = CalibrationDisplay.from_report(report).plot()
    shares, prompts = display.axes_
    band, drawn = shares.patches
    np.testing.assert_allclose(drawn.get_data().values * np.array(report.expected_shares), report.rank_shares)
    half = (band.get_data().values - band.get_data().baseline) / 4
    np.testing.assert_allclose(half * np.array(report.expected_shares), report.share_standard_errors)
    np.testing.assert_allclose(prompts.lines[1].get_ydata(), report.prompt_scores)
    np.testing.assert_allclose(prompts.lines[1].get_xdata()[9], 0.0, atol=1e-12)
    display.figure_.savefig(tmp_path / "display.png")
    assert (tmp_path / "display.png").stat().st_size > 10_000


def test_it_draws_on_given_axes_and_from_what_was_stored(report):
    figure = Figure()
    axes = figure.subplots(1, 2)
    stored = CalibrationReport.from_dict(json.loads(json.dumps(report.to_dict())))
    assert stored == report
    assert CalibrationDisplay(stored).plot(axes).figure_ is figure
    with pytest.raises(InputError, match="there are 1 axes"):
        CalibrationDisplay(report).plot([axes[0]])


def test_lines_speak_up_only_when_something_is_wrong(report):
    assert len(calibration_lines(report)) == 1
    rng = np.random.default_rng(1)
    rewards_PK = rng.normal(size=(50, 32))
    rewards_PK[:, 16:] += 1.0
    rewards_PK[3] = 7.0
    lines = calibration_lines(calibration_report(rewards_PK))
    assert len(lines) == 3
    assert "1 of 50 prompts has one reward for every response" in lines[1]
    assert "do not look like draws of the same policy" in lines[2]
