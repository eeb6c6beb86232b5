"""Figures of the report: what they show, from which numbers, in every format."""

import dataclasses
import json

import numpy as np
import pytest

from infalign.errors import InputError, StorageError
from infalign.evaluation.frontier import frontier
from infalign.evaluation.results import Band, OverN
from infalign.report import curves, figures
from tests.report.example import report_data, sweep, two_methods


class TestFigures:
    def test_plotly_knows_every_property(self):
        go = pytest.importorskip("plotly.graph_objects")
        aware, plain = two_methods()
        look = figures.styles(["aware", "plain"])
        data = report_data()
        built = [
            figures.frontier_figure(frontier([aware, plain], "Best-of-4"), look),
            curves.win_rate_over_n_figure([aware, plain], "best-of-n", look),
            curves.win_rate_over_n_figure([aware, plain], "worst-of-n", look),
            curves.win_rate_over_n_figure([aware, plain], "best-of-n", look, judge="gold"),
            curves.over_kl_figure(sweep(), "Best-of-4", figures.styles_of(sweep()), ["gold"]),
            curves.training_figure(data.curves, look, kl_target=0.2),
            figures.histogram_figure({"reference": [0.1, 0.9], "aware": [0.5]}, look, calibrated=True, title="C"),
            figures.histogram_figure({"reference": [1.0, 1.0]}, look, calibrated=False, title="reward"),
        ]
        for figure in built:
            assert figure is not None
            go.Figure(figure)  # raises on an unknown or ill-typed property
            json.dumps(figure, allow_nan=False)

    def test_frontier_holds_the_points(self):
        aware, plain = two_methods()
        figure = figures.frontier_figure(frontier([aware, plain], "Best-of-4"), figures.styles(["aware", "plain"]))
        limit, first, _ = figure["data"]
        assert limit["y"][0] == 0.5
        assert (first["x"], first["y"]) == ([aware.kl.estimate], [aware.of("Best-of-4").win_rate.estimate])
        assert first["y"][0] + first["error_y"]["array"][0] == pytest.approx(aware.of("Best-of-4").win_rate.high)

    def test_absent_data_gives_no_figure(self):
        look = figures.styles(["a"])
        assert curves.training_figure({"a": [{"step": 1, "loss": 2.0}]}, look) is None
        assert figures.histogram_figure({"a": [float("nan")]}, look, calibrated=False, title="") is None
        short = {family: OverN([1, 2], Band(*[[0.5, 0.5]] * 3), {}) for family in ("best-of-n", "worst-of-n")}
        few = dataclasses.replace(two_methods()[0], over_n=short)
        assert curves.win_rate_over_n_figure([few], "best-of-n", figures.styles(["aware"])) is None

    def test_histograms_are_densities(self):
        values = np.random.default_rng(0).normal(size=500).tolist()
        figure = figures.histogram_figure({"a": values}, figures.styles(["a"]), calibrated=False, title="reward")
        (trace,) = figure["data"]
        assert np.sum(np.diff(trace["x"]) * np.array(trace["y"][:-1])) == pytest.approx(1)

    def test_a_constant_curve_stays_constant(self):
        records = [{"step": step, "beta": 0.3} for step in range(100)]
        (curve,) = curves.training_figure({"a": records}, figures.styles(["a"]))["data"]
        assert set(curve["y"]) == {0.3}, "no rounding for an axis to magnify"

    def test_names_are_text(self):
        assert figures.styles(["<b>"])["<b>"]
        point = dataclasses.replace(two_methods()[0], label="<b>x</b>")
        figure = figures.frontier_figure(frontier([point], "Standard"), figures.styles(["<b>x</b>"]))
        assert "<b>x" not in json.dumps([trace["name"] for trace in figure["data"]])

    def test_colours_show_on_both_papers(self):
        def luminance(colour):
            channels = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
            linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
            return float(linear @ [0.2126, 0.7152, 0.0722])

        for style in figures.styles([str(i) for i in range(8)]).values():
            for paper in ("#ffffff", "#1b1f26"):
                low, high = sorted((luminance(style.colour), luminance(paper)))
                assert (high + 0.05) / (low + 0.05) >= 3, (style.colour, paper)

    def test_sixteen_methods_look_different(self):
        looks = figures.styles([str(i) for i in range(16)]).values()
        assert len({(look.colour, look.symbol) for look in looks}) == 16

    def test_png(self, tmp_path):
        renamed = dataclasses.replace(two_methods()[0], label="_costs $5 and x_1$")
        path = figures.save_frontier_png(tmp_path / "f.png", [frontier([renamed], "Best-of-4")], title="5 $ each $")
        assert path.read_bytes().startswith(b"\x89PNG")
        with pytest.raises(InputError, match="nothing to draw"):
            figures.save_frontier_png(tmp_path / "f.png", [])
        with pytest.raises(StorageError, match="cannot be written"):
            figures.save_frontier_png(tmp_path / "absent" / "f.png", [frontier([renamed], "Best-of-4")])
