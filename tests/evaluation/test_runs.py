"""Several runs on one frontier: what is refused, and differences at one KL against a known truth."""

import dataclasses
import json

import numpy as np
import pytest

from infalign.errors import InputError, MismatchError, StorageError
from infalign.evaluation.frontier import difference_at, least_favourable_at
from infalign.evaluation.measure import measure
from infalign.evaluation.record import Evaluation
from infalign.evaluation.runs import compare_runs, read_runs
from infalign.procedures import BestOfN, Standard
from infalign.report.comparison import check_ending, comparison_text, draw_comparison

NUM_PROMPTS = 60


def gaussian(label, shift, skill=1.0, seed=0):
    """Policy N(skill·shift, 1) against N(0, 1), at the KL of a pure shift: less skill wastes some of it."""
    rng = np.random.default_rng(seed)
    ref_rewards_PK, noise_PG = rng.normal(size=(2, NUM_PROMPTS, 8))
    kl_PG = np.full((NUM_PROMPTS, 8), shift**2 / 2) + 0.02 * rng.normal(size=(NUM_PROMPTS, 8))
    ids = [f"p{i}" for i in range(NUM_PROMPTS)]
    return measure(label, skill * shift + noise_PG, ref_rewards_PK, kl_PG, [Standard(), BestOfN(2)], prompt_ids=ids)


def evaluation(*results, **changes):
    fields = {
        "name": "run",
        "procedure": BestOfN(2).to_dict(),
        "kl_budget": None,
        "reference": "sha256:ref",
        "reward": "reward@1",
        "gold": {},
        "max_new_tokens": 16,
        "stores": {},
        "results": list(results),
        "comparisons": [],
    }
    return Evaluation(**{**fields, **changes})


@pytest.fixture(scope="module")
def two_runs():
    first = evaluation(gaussian("optimal", 0.7), gaussian("identity", 0.7, 0.6))
    second = evaluation(gaussian("optimal", 1.1, seed=1), gaussian("identity", 1.1, 0.6, seed=1))
    return {"low": first, "high": second}


def test_one_frontier_with_differences_at_one_kl(two_runs):
    compared = compare_runs(two_runs)
    assert compared.procedure == "Best-of-2"
    assert [result.label for result in compared.results] == [
        *("low/optimal", "low/identity"),
        *("high/optimal", "high/identity"),
    ]
    assert {point.series for point in compared.frontier.points} == {"optimal", "identity"}
    assert compared.matched
    for one in compared.matched:
        assert (one.method, one.baseline) == ("optimal", "identity")
        # The truth: 40 % less of the shift for the same KL; 1.1 × 0.4 = 0.44 of a standard deviation at the most.
        assert one.resolved
        assert 0.02 < one.least_favourable.estimate <= one.difference.estimate + 1e-12
    text = comparison_text(compared)
    assert "low/optimal" in text
    assert "Against identity at the same KL" in text
    assert "resolved" in text
    assert json.dumps(compared.to_dict(), allow_nan=False)


def test_a_method_against_itself_is_not_resolved(two_runs):
    low, high = two_runs.values()
    other = evaluation(*(dataclasses.replace(r, series="copy") for r in (low.results[1], high.results[1])))
    runs = {"a": evaluation(low.results[1]), "b": evaluation(high.results[1]), "c": other}
    renamed = [dataclasses.replace(r, label=f"copy {i}") for i, r in enumerate(other.results)]
    compared = compare_runs({**runs, "c": dataclasses.replace(other, results=renamed)}, baseline="identity")
    assert compared.matched
    for one in compared.matched:
        assert one.difference.estimate == pytest.approx(0)
        assert not one.resolved


def test_the_least_favourable_difference_never_overstates_on_a_concave_frontier():
    """Exact frontiers ½ + c√KL: the truth at any KL lies on the far side of what is claimed."""

    def exact(c, kl):
        flat = gaussian("x", 1.0)
        entry = flat.of("Standard")
        win = dataclasses.replace(entry.win_rate, per_prompt=[0.5 + c * np.sqrt(kl)] * NUM_PROMPTS)
        kl = dataclasses.replace(flat.kl, estimate=kl, per_prompt=[kl] * NUM_PROMPTS)
        return dataclasses.replace(flat, procedures=[dataclasses.replace(entry, win_rate=win)], kl=kl)

    rng = np.random.default_rng(0)
    for _ in range(20):
        c, d = rng.uniform(0.05, 0.3, size=2)
        ours = [exact(c, kl) for kl in sorted(rng.uniform(0.1, 1.0, size=2))]
        theirs = [exact(d, kl) for kl in sorted(rng.uniform(0.1, 1.0, size=2))]
        kl = rng.uniform(0.02, min(ours[1].kl.estimate, theirs[1].kl.estimate))
        truth = (c - d) * np.sqrt(kl)
        claimed = least_favourable_at(ours, theirs, "Standard", kl).estimate
        between = difference_at(ours, theirs, "Standard", kl).estimate
        if between >= 0:
            assert claimed <= truth + 1e-12
        else:
            assert claimed >= truth - 1e-12


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reward": "other@2"}, r"differ in reward \(reward@1 in one, other@2 in the other\)"),
        ({"reference": "sha256:else"}, "differ in reference"),
        ({"max_new_tokens": 32}, "differ in longest response"),
    ],
)
def test_runs_that_mean_different_things_are_refused(two_runs, changes, message):
    low = two_runs["low"]
    with pytest.raises(MismatchError, match=message):
        compare_runs({"a": low, "b": dataclasses.replace(low, **changes)})


def test_different_rewards_go_by_their_names(two_runs):
    low = two_runs["low"]
    other = dataclasses.replace(
        low, reward="other@2", results=[dataclasses.replace(one, reward="kindness") for one in low.results]
    )
    with pytest.raises(MismatchError, match=r"differ in reward \(reward in one, kindness in the other\)"):
        compare_runs({"a": low, "b": other})


def test_runs_for_different_procedures_are_refused_with_what_to_do(two_runs):
    def only(run, label):
        results = [dataclasses.replace(one, procedures=[one.of(label)]) for one in run.results]
        return dataclasses.replace(run, results=results)

    both, low = two_runs["high"], two_runs["low"]
    wanted = r"b was not measured under Best-of-2, the one that the first run is for\. "
    with pytest.raises(
        InputError, match=wanted + r"To compare them, choose with --procedure .* \(Standard\), or evaluate it"
    ):
        compare_runs({"a": both, "b": only(low, "Standard")})
    with pytest.raises(InputError, match=wanted + r"To compare them, evaluate it under .*infalign evaluate --run b"):
        compare_runs({"a": only(both, "Best-of-2"), "b": only(low, "Standard")})
    assert compare_runs({"a": both, "b": only(low, "Standard")}, procedure="Standard").matched


def test_other_prompts_are_refused_and_counted(two_runs):
    low = two_runs["low"]
    ids = [f"p{i}" for i in range(1, NUM_PROMPTS + 1)]
    moved = [dataclasses.replace(result, prompt_ids=ids) for result in low.results]
    with pytest.raises(MismatchError, match=r"prompts \(59 of 60 and 60 are shared\)"):
        compare_runs({"a": low, "b": dataclasses.replace(low, results=moved)})


def test_what_is_not_there_is_named(two_runs, tmp_path):
    with pytest.raises(InputError, match=r"no method is called 'best'.*optimal, identity"):
        compare_runs(two_runs, baseline="best")
    with pytest.raises(InputError, match=r"low was not measured under Best-of-8\. .* \(Standard, Best-of-2\), or"):
        compare_runs(two_runs, procedure="Best-of-8")
    with pytest.raises(StorageError, match="no finished evaluation here"):
        read_runs([tmp_path])
    with pytest.raises(InputError, match="given twice"):
        read_runs([tmp_path, tmp_path])
    with pytest.raises(InputError, match="no ending"):
        check_ending(tmp_path / "figure.gif")


def test_names_and_figures(two_runs, tmp_path):
    for name, run in two_runs.items():
        folder = tmp_path / name / "run"
        folder.mkdir(parents=True)
        (folder / "evaluation.json").write_text(json.dumps(run.to_dict()))
    runs = read_runs([tmp_path / "low" / "run", tmp_path / "high" / "run"])
    assert list(runs) == ["low/run", "high/run"], "as much of the path as tells them apart"
    compared = compare_runs(runs)
    assert draw_comparison(compared, tmp_path / "f.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in draw_comparison(compared, tmp_path / "f.svg").read_text()
    page = draw_comparison(compared, tmp_path / "f.html").read_text()
    assert "At the same KL, against identity, under Best-of-2" in page
