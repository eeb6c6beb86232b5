"""What reports say of mixtures and reshaped policies: the cost, predictions beside measurements, a single sample."""

import dataclasses
import json

import numpy as np
import pytest

from infalign.errors import InputError
from infalign.evaluation.compare import compare_pairs
from infalign.evaluation.frontier import frontier
from infalign.evaluation.predictability import with_predictability
from infalign.evaluation.results import MethodResult
from infalign.procedures import BestOfN, Standard
from infalign.report import figures
from infalign.report.markdown import render_markdown
from infalign.report.page import ReportData, write_report
from infalign.report.reshaped import cost_rows, prediction_rows, reshaped_lines, shape_figure
from infalign.report.table import text_table
from infalign.report.words import single_samples, verdict
from infalign.reshape import ReshapingData
from infalign.reshape.histogram import log_ratio_histogram
from tests.report.example import HOSTILE, MIXTURE, RESHAPED, method, reshaped_methods, two_methods


@pytest.fixture(scope="module")
def results():
    return reshaped_methods()


def data_of(results):
    return ReportData(
        results, "Best-of-4", baseline="plain", reshapings={"own-mixture": MIXTURE, "plain-reshaped": RESHAPED}
    )


def test_the_record_survives_json_and_older_results_have_none(results):
    again = MethodResult.from_dict(json.loads(json.dumps(results[1].to_dict(), allow_nan=False)))
    assert again.reshaped == results[1].reshaped
    old = {name: value for name, value in two_methods()[0].to_dict().items() if name != "reshaped"}
    assert MethodResult.from_dict(old).reshaped is None


def test_prediction_stands_beside_measurement(results):
    rows = {row.quantity: row for row in prediction_rows(results) if row.label == "own-mixture"}
    assert set(rows) == {"KL, nats", "Standard win rate, %", "Best-of-4 win rate, %"}, "what was both"
    win = results[0].of("Best-of-4").win_rate
    row = rows["Best-of-4 win rate, %"]
    assert row.predicted == "79.0 ± 1.5"
    assert row.measured == f"{100 * win.estimate:.1f} ± {100 * win.standard_error:.1f}"
    assert float(row.apart) == pytest.approx((win.estimate - 0.79) / np.hypot(0.015, win.standard_error), abs=0.05)
    assert prediction_rows([results[2]]) == []


def test_cost_counts_rejected_tokens_and_all_candidates(results):
    mixture, reshaped = cost_rows(results)
    assert mixture.acceptance == "nothing is rejected"
    assert (mixture.per_response, mixture.per_answer) == ("12.5 (predicted 12.0)", "50")
    assert "12.5% from the aligned model (own)" in mixture.made
    assert "trained inside a mixture with 25.0%" in mixture.made
    assert reshaped.acceptance == "42.0% (predicted 40.0%)"
    assert (reshaped.per_response, reshaped.per_answer) == ("29.0 (predicted 30.0)", "116")
    assert reshaped.alone == "2.400 ± 0.100"


def test_the_verdict_says_what_one_sample_is_worth(results):
    own, _, plain = results
    first, second = single_samples(results)
    assert compare_pairs([(own, plain)])[0].resolved, "the example is a clear case"
    assert first.resolved
    assert first.sentence.startswith("One sample of own-mixture instead of Best-of-4 is worth less than one of plain:")
    for result in (own, plain):
        assert f"{100 * result.of('Standard').win_rate.estimate:.1f}%" in first.sentence
    assert "88% of its samples are the reference's own" in first.sentence
    assert "plain-reshaped" in second.sentence
    assert "reference's own" not in second.sentence
    assert [finding.sentence for finding in verdict(results, "Best-of-4", [])][-2:] == [first.sentence, second.sentence]


def test_what_is_not_resolved_is_called_so_and_nothing_is_said_of_plain_methods(results):
    own, _, plain = results
    alike = dataclasses.replace(method("plain-mixture", 0.79), kl=plain.kl, reshaped=own.reshaped)
    (finding,) = single_samples([alike, plain])
    same = dataclasses.replace(plain, label="same", reshaped=own.reshaped)
    (equal,) = single_samples([same, plain])
    assert not equal.resolved
    assert "not resolved whether it is worth less or more than one of plain" in equal.sentence
    assert finding.resolved == compare_pairs([(alike, plain)])[0].resolved
    assert single_samples(two_methods()) == []


def test_without_a_plain_model_the_sentence_gives_both_uses(results):
    (finding,) = single_samples(results[:1])
    wins = [results[0].of(name).win_rate.estimate for name in ("Standard", "Best-of-4")]
    assert f"standard win rate is {100 * wins[0]:.1f}%" in finding.sentence
    assert f"through Best-of-4 it is {100 * wins[1]:.1f}%" in finding.sentence


def test_the_plain_model_at_the_same_kl_is_the_one_set_beside(results):
    own, _, plain = results
    far = dataclasses.replace(method("own", 1.5), label="own")  # the aligned model alone, at 1.1 nats
    assert "than one of plain" in single_samples([own, far, plain])[0].sentence


def test_plain_and_reshaped_are_one_family(results):
    look = figures.styles_of(results)
    plain, reshaped, own = (look[label] for label in ("plain", "plain-reshaped", "own-mixture"))
    assert plain.colour == reshaped.colour != own.colour
    assert (plain.filled, reshaped.filled) == (True, False)
    assert reshaped.symbol == f"{plain.symbol}-open"
    assert len({plain.dash, reshaped.dash, own.dash}) == 3
    figure = figures.frontier_figure(frontier(results, "Best-of-4"), look)
    lines = [trace for trace in figure["data"] if trace.get("showlegend") is False]
    assert len(lines) == 1, "the mixture has no plain form here"
    assert lines[0]["y"] == [results[at].of("Best-of-4").win_rate.estimate for at in (2, 1)]
    assert figures.styles_of(two_methods()) == figures.styles(["aware", "plain"]), "others look as they did"


def test_predictability_is_never_taken_from_a_reshaped_policy(results):
    procedures = [Standard(), BestOfN(4)]
    limited, found = with_predictability(results, procedures)
    assert found.policy == "plain"
    assert limited[0].of("Best-of-4").predictable_limit is not None, "but its limit stands beside every policy"
    assert with_predictability(results[:2], procedures) == (results[:2], None)


def test_the_picture_has_them_too(results, tmp_path):
    assert figures.save_frontier_png(tmp_path / "f.png", [frontier(results, "Best-of-4")]).stat().st_size > 0


class TestShape:
    def test_of_a_mixture_it_is_the_density_itself(self):
        figure = shape_figure(MIXTURE, figures.styles(["a"])["a"])
        g = next(trace for trace in figure["data"] if trace["name"] == "log g")
        assert np.allclose(g["y"], np.log(0.875 + 0.125 * np.exp(g["x"])))
        assert g["yaxis"] == "y2"

    def test_otherwise_it_has_the_mean_one_over_the_references_responses(self):
        figure = shape_figure(RESHAPED, figures.styles(["a"])["a"])
        g = next(trace for trace in figure["data"] if trace["name"] == "log g")
        histogram = RESHAPED["histogram"]
        edges = np.array(histogram["edges"])
        at_bins = np.interp((edges[1:] + edges[:-1]) / 2, g["x"], g["y"])
        mean = (np.exp(at_bins) * histogram["reference"]) @ np.diff(edges)
        assert mean == pytest.approx(1, abs=2e-3), "up to the 161 points of the line"

    def test_plotly_knows_every_property(self):
        go = pytest.importorskip("plotly.graph_objects")
        without = {name: value for name, value in RESHAPED.items() if name != "histogram"}
        for content in (MIXTURE, RESHAPED, without):
            figure = shape_figure({**content, "label": HOSTILE}, figures.styles(["a"])["a"])
            go.Figure(figure)
            assert "<img" not in json.dumps(figure, allow_nan=False)

    def test_the_histogram_keeps_all_rollouts_as_densities(self):
        ratios = [[0.0, 1.0, 2.0, 3.0], [0.0, 1.0, 2.0, 50.0]]
        histogram = log_ratio_histogram(ReshapingData.from_rewards(ratios, ratios), bins=4)
        assert histogram["aligned"] is None
        assert np.diff(histogram["edges"]) @ histogram["reference"] == pytest.approx(1)

    def test_several_aligned_models_have_no_single_log_ratio(self):
        ratios = np.zeros((2, 3, 2))
        with pytest.raises(InputError, match="2 aligned models have no single log-ratio"):
            log_ratio_histogram(ReshapingData.from_rewards(ratios, np.zeros((2, 3))))


def test_page_markdown_and_table_say_it(results, tmp_path):
    data = data_of(results)
    page = write_report(tmp_path / "a.html", data).read_text()
    for told in (
        'id="reshaped"',
        "29.0 (predicted 30.0)",
        "One sample of own-mixture instead of Best-of-4",
        "swatch ring",
    ):
        assert told in page, told
    assert page.count('data-figure="reshaped:') == 2
    text = render_markdown(data)
    assert "## Reshaped policies" in text
    assert "| own-mixture | Best-of-4 win rate, % | 79.0 ± 1.5 |" in text
    table = text_table(results, [], 4, None)
    assert reshaped_lines(results)[0] in table
    assert single_samples(results)[0].sentence in table
    plain = write_report(tmp_path / "b.html", ReportData(list(two_methods()), "Best-of-4")).read_text()
    assert 'id="reshaped"' not in plain
    assert "swatch ring" not in plain
