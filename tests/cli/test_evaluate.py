"""`infalign evaluate`, `report` and `compare` on real (tiny) models, without a recipe."""

import json
import re
import shutil
import sys
from functools import partial

import numpy as np
import pytest

from infalign.rollouts.mixture import MixturePolicy
from infalign.rollouts.opening import save_policy
from infalign.run.testbed.toy import random_llama
from tests.runs import infalign

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")

REWARDS = """
def length(prompts, completions):
    return [float(len(c)) for c in completions]

def vowels(prompts, completions):
    return [float(sum(x in "aeiou" for x in c)) for c in completions]
"""
PROMPTS = [f"Number {i}: " for i in range(24)]


def write_prompts(path, prompts):
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    folder = tmp_path_factory.mktemp("job")
    for seed, name in enumerate(("base", "tuned")):
        random_llama(folder / name, None, seed=seed)
    random_llama(folder / "words", 20)
    for name in ("first/judge", "second/judge"):
        random_llama(folder / name, None, seed=len(name), reward_model=True)
    write_prompts(folder / "prompts.jsonl", [*PROMPTS, PROMPTS[0]])
    (folder / "eval_rewards.py").write_text(REWARDS)
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))


@pytest.fixture
def run(job, capsys, monkeypatch):
    """Exit code, stdout and stderr of one command in the job's folder."""
    monkeypatch.chdir(job)
    return partial(infalign, capsys, monkeypatch)


COMMON = ("--reference", "base", "--reward", "eval_rewards:length", "--prompts", "prompts.jsonl", "--samples", 8)
COMMON += ("--max-new-tokens", 4)


@pytest.fixture(scope="module")
def evaluated(job):
    """Where the evaluation of both models, the reference itself among them, is; the first test makes it."""
    return job / "both"


def test_models_against_a_reference(run, job, evaluated):
    arguments = ("evaluate", "--model", "tuned", "--model", "same=base", *COMMON, "--out", evaluated, "--json")
    arguments += ("--gold", "vowels=eval_rewards:vowels", "--procedures", "best-of-4,worst-of-2,standard")
    code, out, err = run(*arguments)
    assert code == 0, err
    content = json.loads(out)
    tuned, same = content["results"]
    assert [tuned["label"], same["label"]] == ["tuned", "same"]
    assert tuned["kl"]["low"] > 0
    # A model against itself: KL exactly 0; win rates of one half from independent samples. Each of the three is
    # off by 4.5 standard errors with probability 7e-6.
    assert same["kl"]["estimate"] == pytest.approx(0, abs=1e-6)
    for entry in same["procedures"]:
        win = entry["win_rate"]
        assert abs(win["estimate"] - 0.5) < 4.5 * win["standard_error"], entry["procedure"]
        assert win["standard_error"] > 0
    assert set(tuned["procedures"][0]["judged"]) == {"vowels"}
    assert tuned["over_n"]["best-of-n"]["n"] == list(range(1, 9))
    assert tuned["diagnostics"]["distinct"] is None or 0 < tuned["diagnostics"]["distinct"]["estimate"] <= 1
    assert "1 row of prompts.jsonl repeats a prompt and is left out" in err
    assert any("It is not known which prompts" in warning for warning in content["warnings"])
    assert (evaluated / "report.html").read_text().count("It is not known which prompts") >= 1
    drawn = sorted((path, path.stat().st_mtime_ns) for path in evaluated.rglob("rollouts/*/rollouts/*.parquet"))
    assert len({path.parent for path, _ in drawn}) == 3
    # In another order, with fewer procedures: nothing is drawn again.
    code, out, err = run("evaluate", "--model", "same=base", "--model", "tuned", *COMMON, "--out", evaluated, "--json")
    assert code == 0, err
    assert "Fresh rollouts" not in err
    assert drawn == sorted((path, path.stat().st_mtime_ns) for path in evaluated.rglob("rollouts/*/rollouts/*.parquet"))
    again = {entry["procedure"]: entry for entry in json.loads(out)["results"][1]["procedures"]}
    assert again["Best-of-4"]["win_rate"] == tuned["procedures"][0]["win_rate"]


def test_a_mixture_is_evaluated_like_any_model(run, job):
    """KL exact, of the mixture itself: half of the rollouts are the base's, so it is well below the tuned model's."""
    save_policy(MixturePolicy(job / "base", job / "tuned", 0.5), job / "half")
    code, printed, _ = run("evaluate", "--model", "half", "--model", "tuned", *COMMON, "--out", "mixed", "--json")
    assert code == 0
    half, tuned = json.loads(printed)["results"]
    assert half["label"] == "half"
    # KL of a mixture is convex in its weight: at most half of the tuned model's, at most log 2 from either.
    assert 0 < half["kl"]["estimate"] < 0.5 * tuned["kl"]["estimate"] + 3 * tuned["kl"]["standard_error"]
    assert (job / "mixed" / "report.html").is_file()
    (store,) = (job / "mixed" / "rollouts").glob("half-*")
    kept = json.loads((store / "kl.json").read_text())
    assert np.shape(kept["exact_kl_PG"]) == (24, 8)
    # The decoder takes the same folder.
    code, printed, _ = run("decode", "Number 1: ", "--model", "half", "--n", 4, "--reward", "eval_rewards:length",
                           "--max-new-tokens", 4, "--json")  # fmt: skip
    assert code == 0
    (answer,) = json.loads(printed)["answers"]
    assert len(answer["candidates"]) == 4


def test_reports_in_three_forms(run, evaluated):
    for form in ("html", "md", "json"):
        code, out, err = run("report", evaluated, "--format", form)
        assert code == 0, err
        assert out.strip() == f"Report: {evaluated / f'report.{form}'}"
    text = (evaluated / "report.md").read_text()
    for part in (
        "# both",
        "## Numbers",
        "## What the mean may hide",
        "## What not to conclude",
        "would by chance alone",
    ):
        assert part in text
    content = json.loads((evaluated / "report.json").read_text())
    assert {"results", "findings", "cautions", "versions"} <= set(content)
    code, out, _ = run("report", evaluated, "--json")
    assert json.loads(out)["report"].endswith("report.html")


def test_compare_puts_evaluations_on_one_frontier(run, evaluated, job):
    other = job / "other"
    if not other.exists():
        shutil.copytree(evaluated, other)
    code, out, err = run("compare", evaluated, other, "--plot", job / "frontier.svg", "--baseline", "tuned", "--json")
    assert code == 0, err
    content = json.loads(out)
    assert {row["label"] for row in content["results"]} == {
        f"{run}/{m}" for run in ("both", "other") for m in ("same", "tuned")
    }
    assert (job / "frontier.svg").exists()
    assert content["left_out"] or content["matched"]
    assert content["runs"] == {"both": str(evaluated), "other": str(other)}
    changed = json.loads((other / "evaluation.json").read_text()) | {"reference": "sha256:other"}
    third = job / "third"
    third.mkdir(exist_ok=True)
    (third / "evaluation.json").write_text(json.dumps(changed))
    code, _, err = run("compare", evaluated, third)
    assert code == 2
    assert "differ in reference" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "words", *COMMON), "different tokenizers (their vocabularies differ)"),
        (("--model", "tuned", *COMMON, "--procedures", "best-of-16"), "Best-of-16 needs 16 samples of each prompt"),
        (("--model", "tuned", "--model", "tuned", *COMMON), "two models would be called tuned"),
        (("--model", "tuned", *COMMON, "--gold", "eval_rewards:length"), "this is the reward itself"),
        (
            ("--model", "tuned", *COMMON, "--gold", "x=eval_rewards:vowels", "--gold", "x=m:f"),
            "two gold rewards are called x",
        ),
        (("--model", "tuned", *COMMON, "--gold", "reward=eval_rewards:vowels"), "this name is the reward's own"),
        (("--model", "tuned", *COMMON, "--procedures", "best-of-4,best-of-4"), "Best-of-4 is named twice"),
        (("--model", "tuned", *COMMON, "--gold", "eval_rewards:x"), "reward function eval_rewards:x: the function"),
        (("--model", "tuned", "--reference", "base", "--prompts", "prompts.jsonl"), "there is no reward"),
        (("--model", "./absent", *COMMON), "./absent: there is no such folder"),
        (("--model", "tuned", *COMMON, "--checkpoints"), "--checkpoints are those of a run"),
        ((), "there is nothing to evaluate"),
        (("--run", "anywhere", "--column", "text"), "--column does nothing without --prompts"),
        (("recipe.yaml", "--model", "tuned"), "a recipe says itself what is evaluated"),
        (("recipe.yaml", "--samples", 8), "a recipe says itself what is evaluated, and how"),
        (("recipe.yaml", "--checkpoints"), "a recipe says itself what is evaluated, and how"),
    ],
)
def test_refused_before_anything_is_drawn(run, job, arguments, message):
    code, out, err = run("evaluate", *arguments, "--out", job / "refused")
    assert code == 2
    assert out == ""
    assert message in " ".join(err.split())
    assert "Traceback" not in err
    assert not (job / "refused").exists()


def test_the_folder_of_a_run_is_not_overwritten(run, job):
    made = job / "made"
    made.mkdir()
    (made / "run.json").write_text("{}")
    code, _, err = run("evaluate", "--model", "tuned", *COMMON, "--out", made)
    assert code == 2
    assert "would be overwritten" in " ".join(err.split())
    assert [path.name for path in made.iterdir()] == ["run.json"]


def test_a_procedure_from_life_is_evaluated_like_any_other(run, job):
    import numpy as np

    from infalign.procedures import FittedProcedure

    fitted = FittedProcedure.from_ranks(np.random.default_rng(0).uniform(size=400) ** 0.5)  # about Best-of-2
    (job / "fitted.json").write_text(json.dumps(fitted.to_dict()))
    arguments = ("--model", "tuned", *COMMON, "--procedures", "fitted.json,best-of-2", "--out", job / "both", "--json")
    code, out, err = run("evaluate", *arguments)
    assert code == 0, err
    ours, best = json.loads(out)["results"][0]["procedures"]
    assert ours["n"] is None
    assert abs(ours["win_rate"]["estimate"] - best["win_rate"]["estimate"]) < 0.1


def test_prompts_that_a_model_was_trained_on_are_refused_or_marked(run, job):
    trained = job / "trained"
    shutil.copytree(job / "tuned", trained / "policies" / "ours" / "model", dirs_exist_ok=True)
    (trained / "prompts").mkdir(exist_ok=True)
    (trained / "run.json").write_text('{"name": "trained", "format": 1}')
    rows = [{"id": "", "prompt": prompt, "row": {}} for prompt in (PROMPTS[3], "another")]
    (trained / "prompts" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = trained / "policies" / "ours" / "model"
    code, _, err = run("evaluate", "--model", model, *COMMON, "--out", job / "overlap")
    assert code == 2
    assert "1 of 24 prompts was calibrated or trained on by ours" in " ".join(err.split())
    assert not (job / "overlap").exists()
    code, out, err = run("evaluate", "--model", model, *COMMON, "--out", job / "overlap", "--allow-overlap")
    assert code == 0, err
    assert "Note: 1 of 24 prompts was calibrated or trained on by ours: the numbers flatter them." in out
    page = (job / "overlap" / "report.html").read_text()
    assert "the numbers flatter them" in page
    assert "24 prompts × 8 fresh rollouts per model" in out
    assert "on 24 prompts." in page
    assert "On 24 prompts we drew" in page
    assert json.loads((job / "overlap" / "evaluation.json").read_text())["held_out"] is False


def test_judges_go_by_the_names_of_their_folders(run, job):
    arguments = ("--model", "tuned", *COMMON, "--reward", "first/judge", "--gold", "second/judge")
    code, out, err = run("evaluate", *arguments, "--out", job / "both")
    assert code == 0, err
    assert "Judge: judge (2)." in out
    assert "Judged by judge, which" in out
    assert "sequence-classification@" not in out
    text = re.sub(r"<script.*?</script>", "", (job / "both" / "report.html").read_text(), flags=re.DOTALL)
    assert "judged by judge (2)" in text
    assert "sequence-classification@" not in text
