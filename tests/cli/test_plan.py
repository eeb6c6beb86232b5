"""`infalign plan` as a user meets it."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import typer
from typer.testing import CliRunner

import infalign as ia
from infalign.cli.plan import plan_command
from infalign.cli.sources import parse_procedure


@pytest.fixture
def plan():
    """Runs the verb; errors of the user come out as exceptions."""
    app = typer.Typer()
    app.command("plan")(plan_command)
    app.command("other")(lambda: None)  # with two verbs, the verb's name is part of the command line
    return lambda *arguments: CliRunner().invoke(app, ["plan", *map(str, arguments)], catch_exceptions=False)


def test_json_is_alone_on_stdout_and_holds_the_plan(plan):
    result = plan("best-of-n", "--n", 4, "--beta", 0.1, "--json")
    assert result.exit_code == 0
    content = json.loads(result.stdout)
    best = ia.optimal_transform(ia.BestOfN(4), 0.1)
    assert content["kl"] == pytest.approx(best.kl, abs=1e-9)
    assert content["win_rate"] == pytest.approx(best.win_rate, abs=1e-9)
    assert content["standard_win_rate"] == pytest.approx(best.standard_win_rate, abs=1e-9)
    assert content["beta"] == 0.1
    assert content["procedure"] == {"kind": "best-of-n", "n": 4}
    labels = [option["label"] for option in content["alternatives"]]
    assert labels[:3] == ["identity", "log", "exponential, t=10"]


def test_the_table_names_every_choice_and_the_price_of_few_rollouts(plan):
    result = plan("worst-of-4", "--kl", 0.5, "--num-ref", 16, "--num-ref", 64, "--also", "standard")
    assert result.exit_code == 0
    for text in ("Worst-of-4", "0.9479", "identity", "log", "exponential, t=-10", "lost", "K = 16", "K = 64"):
        assert text in result.stdout


def test_eighty_columns_hold_every_number(plan, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    also = [part for other in ("standard", "best-of-8", "worst-of-4") for part in ("--also", other)]
    result = plan("best-of-64", "--kl", 0.25, "--num-ref", 64, *also)
    assert max(map(len, result.stdout.splitlines())) <= 80
    assert "…" not in result.stdout
    made = ia.plan(ia.BestOfN(64), kl_budget=0.25, others=[ia.WorstOfN(4)])
    for option in (made.best, *made.alternatives):
        assert f"{option.win_rate:.4f}" in result.stdout
        assert f"{option.other_win_rates['Worst-of-4']:.4f}" in result.stdout
    assert f"{made.frontier.at(0.125):.4f}" in result.stdout


def test_the_saved_transform_is_the_plans(plan, tmp_path):
    path = tmp_path / "transform.json"
    plan("best-of-4", "--kl", 0.5, "--save", path, "--json")
    saved = ia.RewardTransform.load(path)
    assert ia.TiltedPolicy(saved, json.loads(path.read_text())["about"]["beta"]).kl == pytest.approx(0.5, abs=1e-6)


@pytest.mark.parametrize(("ending", "start"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("html", b"<!doctype html>")])
def test_figures_are_drawn(plan, tmp_path, ending, start):
    pytest.importorskip("plotly" if ending == "html" else "matplotlib")
    path = tmp_path / f"plan.{ending}"
    result = plan("best-of-2", "--kl", 0.3, "--plot", path, "--json")
    json.loads(result.stdout)
    assert path.read_bytes().startswith(start)


def test_an_opponent_and_a_file(plan, tmp_path):
    path = tmp_path / "mixture.json"
    mixture = ia.Mixture([(0.5, ia.Standard()), (0.5, ia.BestOfN(4))])
    path.write_text(json.dumps(mixture.to_dict()))
    content = json.loads(plan(path, "--beta", 0.2, "--opponent", "standard", "--json").stdout)
    best = ia.optimal_transform(mixture, 0.2, opponent=ia.Standard())
    assert content["win_rate"] == pytest.approx(best.win_rate, abs=1e-9)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["best-of-n", "--beta", 0.1], "--n 4"),
        (["best-of-n", "--n", 0, "--beta", 0.1], "whole number"),
        (["best-of-n", "--n", 4, "--k", 2, "--beta", 0.1], "--k does not go"),
        (["best-of-4", "--n", 4, "--beta", 0.1], "do not go with"),
        (["order-statistic", "--n", 4, "--beta", 0.1], "--k"),
        (["order-statistic", "--n", 4, "--k", 5, "--beta", 0.1], "more than n"),
        (["beam-search", "--beta", 0.1], "unknown procedure"),
        (["best-of-4"], "exactly one"),
        (["best-of-4", "--beta", 0.1, "--kl", 0.5], "exactly one"),
        (["best-of-4", "--beta", -1], "beta"),
        (["best-of-4", "--kl", 0], "positive"),
        (["worst-of-64", "--kl", 5], "out of reach"),
        (["best-of-4", "--kl", 1, "--save", "one.svg", "--plot", "one.svg"], "both name"),
        (["best-of-4", "--kl", 8, "--num-ref", 32], "cannot spend"),
        (["best-of-99999999999999999999", "--kl", 1], "more responses than can be resolved"),
        (["best-of-4", "--kl", 0.5, "--num-ref", 0], "num_ref"),
        (["best-of-4", "--kl", 0.5, "--plot", "plan.pdf"], r"\.png, \.svg or \.html"),
    ],
)
def test_mistakes_are_named(plan, arguments, message):
    with pytest.raises(ia.InputError, match=message):
        plan(*arguments)


def test_files_that_cannot_be_used_are_named(tmp_path):
    with pytest.raises(ia.StorageError, match="missing"):
        parse_procedure(str(tmp_path / "missing.json"))
    path = tmp_path / "other.json"
    for content, message in [
        ("[1]", "does not describe"),
        ("{", "JSON"),
        ('{"kind": "beam"}', "unknown procedure kind"),
        ('{"format": "infalign.transform"}', "a transform, not a procedure"),
    ]:
        path.write_text(content)
        with pytest.raises(ia.InputError, match=rf"other\.json.*{message}"):
            parse_procedure(str(path))


def test_names_on_the_command_line():
    assert parse_procedure("Best-of-4") == ia.BestOfN(4)
    assert parse_procedure("worst-of-8") == ia.WorstOfN(8)
    assert parse_procedure("3-of-5") == ia.OrderStatistic(k=3, n=5)
    assert parse_procedure("standard") == ia.Standard()


def test_importing_the_library_is_light():
    """`import infalign` loads no array library at all; the names come on first use."""
    heavy = "torch", "transformers", "matplotlib", "plotly", "scipy", "numpy"
    code = f"import sys, infalign; print([name for name in {heavy!r} if name in sys.modules]); infalign.BestOfN(4)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


def test_every_public_name_is_there():
    for name in ia.__all__:
        assert getattr(ia, name) is not None
        assert name in dir(ia)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = ia.nothing


def test_predictability_gives_both_limits_and_what_each_n_brings(plan, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    result = plan("best-of-16", "--kl", 0.5, "--predictability", 0.7)
    assert result.exit_code == 0
    assert max(map(len, result.stdout.splitlines())) <= 80
    text = " ".join(result.stdout.split())
    # METHOD.md 9.1: .889 / .792 at Best-of-16, .979 / .822 at Best-of-64.
    assert "Limit 0.8891 at a predictability of 0.7 (Gaussian model); 0.9717 for a policy" in text
    assert "beta 0.21516" in text
    assert "Best-of-16 0.889 0.792 9.7 pt 12.3 0.972" in text
    assert "Best-of-64 0.979 0.822 15.7 pt" in text
    assert "raw" in text
    assert "one-sided" in text
    assert "Hint" not in text


def test_predictability_in_json(plan):
    content = json.loads(plan("worst-of-4", "--kl", 0.5, "--predictability", 0.5, "--num-ref", 32, "--json").stdout)
    assert content["predictability"] == 0.5
    assert content["win_rate"] == pytest.approx(0.708, abs=6e-4)
    assert content["idealised"]["win_rate"] == pytest.approx(0.948, abs=6e-4)
    rates = {option["label"]: option["win_rate"] for option in content["alternatives"]}
    assert rates["identity"] == pytest.approx(0.700, abs=6e-4)
    assert rates["raw"] == pytest.approx(0.695, abs=6e-4)
    assert all(rate <= content["win_rate"] + 1e-7 for rate in rates.values())
    assert [gain["n"] for gain in content["by_n"]] == [4, 8, 16, 32, 64]
    assert content["frontier"]["kl"][-1] >= 1.0
    assert 0 < content["finite_k"][0]["win_rate_lost"] < 0.005
    assert "usual" not in content


def test_without_it_there_is_a_hint(plan):
    text = " ".join(plan("best-of-16", "--kl", 0.5).stdout.split())
    assert "rarely has a predictability above 0.7. At 0.6 the limit here is 0.843" in text
    assert "--predictability 0.6" in text
    usual = json.loads(plan("best-of-16", "--kl", 0.5, "--json").stdout)["usual"]
    assert usual["identity"] == pytest.approx(0.768, abs=6e-4)


def test_a_predictability_that_is_none_is_refused(plan):
    with pytest.raises(ia.errors.InputError, match="out of range"):
        plan("best-of-4", "--kl", 0.5, "--predictability", 1.5)


def test_its_plan_can_be_drawn_and_stored(plan, tmp_path):
    picture, stored = tmp_path / "plan.svg", tmp_path / "transform.json"
    result = plan("best-of-4", "--kl", 0.5, "--predictability", 0.7, "--plot", picture, "--save", stored)
    assert result.exit_code == 0
    assert picture.stat().st_size > 10_000
    assert ia.RewardTransform.load(stored)(1.0) > 0
