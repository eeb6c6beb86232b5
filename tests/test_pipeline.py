"""The whole pipeline on real (tiny) models: what it leaves, what it redoes, and how it survives being killed."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from huggingface_hub import ModelCard

from infalign.calibration.calibrator import RewardCalibrator
from infalign.errors import MismatchError, RewardError, StorageError
from infalign.rollouts.store import RolloutStore
from infalign.run.folder import RunFolder
from infalign.run.pipeline import Pipeline
from infalign.run.recipe import load_recipe
from infalign.run.testbed.toy import random_llama
from tests.rollouts.test_endpoint import Server, choices
from tests.runs import Recorder, infalign

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")

RECIPE = """
name: tiny
policy: {model: policy}
reward: {function: "tiny_rewards:vowels"}
prompts: {source: prompts.jsonl, train: 6, evaluation: 6, held_out: 0.5}
procedure: best-of-2
rollouts: {num_ref: 4, max_new_tokens: 4}
kl_budget: 0.2
training: {steps: 3, prompts_per_step: 2, num_generations: 4, learning_rate: 1.0e-2, save_steps: 1}
evaluation: {num_samples: 4, procedures: [standard, best-of-2, worst-of-2]}
"""
REWARDS = """
def vowels(prompts, completions, note):
    assert all(prompt == f"Say {n[0]}: " for prompt, n in zip(prompts, note, strict=True)), "each its own row"
    return [sum(c in "aeiou" for c in text) + len(text) / 100 for text in completions]

# The two sample responses of the check before a run do not show what is wrong with these.
def broken(prompts, completions):
    return [float("nan") if len(completions) > 2 else 1.0 for _ in completions]

def short(prompts, completions):
    return [1.0] * (len(completions) - (len(completions) > 2))

def short_is_good(prompts, completions):
    return [-1e6 * len(text) for text in completions]

def sometimes(prompts, completions):
    return [None if sum(map(ord, text)) % 29 == 0 else float(len(text)) for text in completions]

def letters(prompts, completions):
    return [float(sum(map(ord, text))) for text in completions]

def constant(prompts, completions):
    return [1.0] * len(completions)

def shortness(prompts, completions):
    return [-len(text) for text in completions]

def patchy(prompts, completions, prompt_id):
    first = min(prompt_id)
    return [None if prompt == first and "a" <= text[:1] <= "z" else 1.0 for prompt, text in zip(prompt_id, completions)]
"""


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """A folder with a policy, prompts, a reward function and a recipe."""
    folder = tmp_path_factory.mktemp("job")
    random_llama(folder / "policy", None, hidden_size=16, seed=1)
    prompts = [
        # Columns of mixed types, and with names that the trainer uses itself.
        {"prompt": f"Say {word}: ", "note": [word, {"n": 1}], "mixed": word if len(word) > 3 else 3, "trainer_state": 1}
        for word in ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    ]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts * 2))
    (folder / "tiny_rewards.py").write_text(REWARDS)
    (folder / "recipe.yaml").write_text(RECIPE)
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))


def run(job, out, *overrides, only=None):
    recorder = Recorder()
    result = Pipeline(load_recipe(job / "recipe.yaml", overrides), out, recorder).run(only)
    return result, recorder


@pytest.fixture(scope="module")
def finished(job, tmp_path_factory):
    out = tmp_path_factory.mktemp("finished") / "run"
    result, recorder = run(job, out)
    return out, result, recorder


def test_it_leaves_models_results_and_a_report(finished):
    out, result, _ = finished
    for name in ("optimal", "identity"):
        assert (out / "policies" / name / "model" / "model.safetensors").exists()
        assert (out / "policies" / name / "model" / "tokenizer.json").exists()
        card = ModelCard.load(out / "policies" / name / "model" / "README.md")
        assert "infalign" in card.data.tags
        assert "4 fresh responses each" in card.text, "written again when it was measured"
        assert str(out.parent) not in card.content
    assert "<html" in (out / "report.html").read_text()
    (optimal, identity) = result["results"]
    assert [optimal["label"], identity["label"]] == ["optimal", "identity"]
    assert optimal["num_samples"] == 4
    assert "KL budget 0.2 nats; reached:" in result["text"]


def test_evaluation_prompts_and_rollouts_are_fresh(finished):
    from infalign.rollouts.store import RolloutStore

    out, _, _ = finished
    sides = {}
    for side in ("train", "evaluation"):
        sides[side] = {json.loads(line)["id"] for line in (out / "prompts" / f"{side}.jsonl").read_text().splitlines()}
    assert not sides["train"] & sides["evaluation"]
    seeds = [RolloutStore.open(folder).key.seed for folder in sorted((out / "rollouts").iterdir())]
    assert len(set(seeds)) == len(seeds) == 4


def test_the_models_hold_no_pickle(finished):
    out, _, _ = finished
    assert not [path for path in (out / "policies").rglob("*") if path.suffix in {".bin", ".pt", ".pkl"}]


def test_a_second_run_at_the_same_time_is_refused(job, finished):
    out, _, _ = finished
    with RunFolder(out, "tiny").writing(), pytest.raises(StorageError, match="another process"):
        run(job, out)


def test_a_second_run_repeats_nothing(job, finished):
    out, result, _ = finished
    again, recorder = run(job, out)
    assert recorder.done == []
    assert again["text"] == result["text"]


def test_two_runs_give_the_same_table(job, finished, tmp_path):
    _, result, _ = finished
    again, _ = run(job, tmp_path / "again")
    assert again["results"] == result["results"]


@pytest.mark.parametrize(
    ("override", "redone"),
    [
        ("evaluation.confidence=0.9", ["Measure win rates and KL", "Write the report"]),
        (
            "training.steps=2",
            [
                *("Align (optimal)", "Align (identity)", "Fresh rollouts (optimal)", "Fresh rollouts (identity)"),
                *("Measure win rates and KL", "Write the report"),
            ],
        ),
        (
            "compare_with=[]",
            ["Choose beta and transforms", "Measure win rates and KL", "Write the report"],
        ),
    ],
)
def test_a_changed_setting_redoes_exactly_what_depends_on_it(job, finished, tmp_path, override, redone):
    out, _, _ = finished
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-r", str(out), str(copy)], check=True)
    _, recorder = run(job, copy, override)
    assert sorted(recorder.done) == sorted(redone)


def test_evaluation_rollouts_of_unknown_origin_are_put_aside_and_drawn_anew(job, finished, tmp_path):
    """Nothing says any more which training they belong to, and the next one gives another model."""
    out, _, _ = finished
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-r", str(out), str(copy)], check=True)
    (copy / "stages" / "evaluation-optimal.json").unlink()
    before = RolloutStore.read(copy / "rollouts" / "evaluation-optimal").key
    _, recorder = run(job, copy, "training.steps=2")
    assert "Fresh rollouts (optimal)" in recorder.done
    assert RolloutStore.read(copy / "rollouts" / "evaluation-optimal").key.model != before.model
    (kept,) = copy.glob("superseded/evaluation-optimal-unknown-*/rollouts/evaluation-optimal")
    assert RolloutStore.read(kept).key == before


def test_a_gold_reward_judges_and_redoes_only_scoring_and_measuring(job, finished, tmp_path):
    from infalign.rollouts.store import RolloutStore

    out, _, _ = finished
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-r", str(out), str(copy)], check=True)
    gold = 'evaluation.gold=[{function: "tiny_rewards:shortness"}, {name: flat, function: "tiny_rewards:constant"}]'
    result, recorder = run(job, copy, gold)
    assert recorder.done == [
        *("Score by gold reward (shortness)", "Score by gold reward (flat)"),
        *("Measure win rates and KL", "Write the report"),
    ]
    for method in result["results"]:
        for entry in method["procedures"]:
            assert set(entry["judged"]) == {"shortness", "flat"}
            assert entry["judged"]["flat"]["estimate"] == pytest.approx(0.5), "every pair is a tie"
        assert set(method["over_n"]["best-of-n"]["judged"]) == {"shortness", "flat"}
    assert len(RolloutStore.open(copy / "rollouts" / "evaluation-reference").reward_sources) == 3
    assert "Judged by shortness, which training never saw:" in result["text"]
    assert "Judged by other rewards" in (copy / "report.html").read_text()
    _, recorder = run(job, copy)
    assert recorder.done == ["Measure win rates and KL", "Write the report"]


def test_a_missing_gold_score_is_refused(job, finished, tmp_path):
    from infalign.errors import InfalignError

    out, _, _ = finished
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-r", str(out), str(copy)], check=True)
    with pytest.raises(InfalignError, match="could not be scored"):
        run(job, copy, 'evaluation.gold=[{function: "tiny_rewards:patchy"}]')


def test_results_of_an_earlier_version_are_measured_again_or_refused(job, finished, tmp_path):
    from infalign.errors import InputError
    from infalign.evaluation.record import Evaluation

    out, _, _ = finished
    old = json.loads((out / "evaluation.json").read_text())
    for entry in old["results"]:
        del entry["diagnostics"]
    (tmp_path / "evaluation.json").write_text(json.dumps(old))
    with pytest.raises(InputError, match="Evaluate again with the same command"):
        Evaluation.read(tmp_path)


def test_kept_checkpoints_can_be_evaluated(job, tmp_path, monkeypatch, capsys):
    """Three steps, a checkpoint after each: proxy and gold along the training, from the run's own settings."""
    out = tmp_path / "run"
    run(
        job,
        out,
        "training.keep_checkpoints=true",
        "compare_with=[]",
        'evaluation.gold=[{function: "tiny_rewards:shortness"}]',
    )
    kept = sorted(path.name for path in (out / "policies" / "optimal" / "checkpoints").glob("checkpoint-*"))
    assert kept == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]
    assert not [path for path in (out / "policies").rglob("*") if path.suffix in {".bin", ".pt", ".pth", ".pkl"}]
    where = tmp_path / "along"
    command = ["evaluate", "--run", str(out), "--trust-run", "--checkpoints", "--out", str(where), "--json"]
    monkeypatch.chdir(job)
    code, told, err = infalign(capsys, monkeypatch, *command)
    assert code == 0, err
    found = json.loads(told)
    assert [(one["label"], one["step"]) for one in found["results"]] == [
        *(("optimal step 1", 1), ("optimal step 2", 2), ("optimal step 3", 3), ("optimal", None)),
    ]
    assert {one["series"] for one in found["results"]} == {"optimal"}
    assert found["stores"]["reference"].endswith("run/rollouts/evaluation-reference"), "drawn once, by the run"
    assert found["warnings"] == []
    page = (where / "report.html").read_text()
    assert "from the reference on. Solid: judged by" in page
    _, told, _ = infalign(capsys, monkeypatch, *command[:4], "--out", tmp_path / "final", "--json")
    again = json.loads(told)
    run_result = json.loads((out / "evaluation.json").read_text())["results"][0]
    assert again["results"][0]["procedures"][0]["win_rate"] == run_result["procedures"][1]["win_rate"], (
        "the same rollouts"
    )


def test_stage_by_stage_gives_the_same_and_refuses_to_skip(job, finished, tmp_path):
    _, result, _ = finished
    out = tmp_path / "stages"
    for only in ("calibrate", "train", "evaluate", "report"):
        with pytest.raises(MismatchError, match=r"'prompts' has not been done.*`infalign rollout RECIPE`"):
            run(job, out, only=only)
    results = {only: run(job, out, only=only)[0] for only in ("rollout", "calibrate", "train", "evaluate", "report")}
    assert results["report"]["results"] == result["results"]
    (out / "stages" / "evaluation-optimal.json").unlink()
    with pytest.raises(MismatchError, match=r"'evaluation-optimal' has not been done.*`infalign evaluate RECIPE`"):
        run(job, out, only="report")
    drawn = results["rollout"]
    prompts = len((out / "prompts" / "train.jsonl").read_text().splitlines())
    assert (drawn["prompts"], drawn["rollouts"], drawn["unscored"]) == (prompts, 4 * prompts, 0)
    assert 4 * prompts <= drawn["tokens"] <= 16 * prompts
    assert f"{4 * prompts} reference rollouts of {prompts} prompts" in drawn["text"]
    calibrated = results["calibrate"]
    assert set(calibrated["calibration"]) >= {"prompts", "num_ref", "tie_mass", "report"}
    assert 0.0 <= calibrated["calibration"]["report"]["held_out_p_value"] <= 1.0
    assert 0.0 < calibrated["plan"]["win_rate_lost"] < 0.5
    json.dumps(calibrated, allow_nan=False)
    assert "Held-out references: mean" in calibrated["text"]
    assert "4 references per prompt cost" in calibrated["text"]
    with pytest.raises(MismatchError, match=r"other settings \(.*num_ref: 4 then, 5 now"):
        run(job, out, "rollouts.num_ref=5", only="calibrate")


def test_another_recipes_folder_is_refused(job, finished):
    out, _, _ = finished
    with pytest.raises(MismatchError, match="holds a run of 'tiny', not of 'other'"):
        run(job, out, "name=other")


@pytest.mark.parametrize(
    ("function", "message"), [("broken", "NaN|nan"), ("short", r"\d+ rewards? for \d+ completions?")]
)
def test_a_broken_reward_loses_nothing(job, tmp_path, function, message):
    with pytest.raises(RewardError, match=message):
        run(job, tmp_path / "run", f"reward.function=tiny_rewards:{function}")
    _, recorder = run(job, tmp_path / "run", only="rollout")
    assert "Draw 4 reference rollouts per prompt" not in recorder.done, "the rollouts are still there"


def test_a_constant_reward_is_refused_before_training(job, tmp_path):
    from infalign.errors import InputError

    with pytest.raises(InputError, match="nothing to learn"):
        run(job, tmp_path / "run", "reward.function=tiny_rewards:constant")


@pytest.mark.slow
def test_killed_again_and_again_it_ends_with_the_same_table(job, finished, tmp_path):
    """kill -9 at six moments spread over the run; the seventh attempt is left alone."""
    _, result, _ = finished
    out = tmp_path / "killed"
    command = [sys.executable, "-m", "infalign", "run", "recipe.yaml", "--out", str(out), "--json"]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    moments = ["reference rollouts", "Align (optimal) …", "Align (identity) …", "Fresh rollouts (reference)"]
    moments += ["Fresh rollouts (identity)", "Measure"]
    for number, moment in enumerate(moments):
        with subprocess.Popen(
            command, cwd=job, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        ) as process:
            for line in process.stderr:
                if moment in line:
                    time.sleep(0.1 * number)  # somewhere within the stage
                    process.send_signal(signal.SIGKILL)
                    break
    finishing = subprocess.run(command, cwd=job, env=environment, capture_output=True, text=True)
    assert finishing.returncode == 0, finishing.stderr
    assert json.loads(finishing.stdout)["results"] == result["results"]


def test_several_rewards_are_combined_after_calibration(job, tmp_path):
    """What is trained on and judged by is the mean of quantiles, in which a scale of a million counts nothing."""
    rewards = "[{function: 'tiny_rewards:vowels'}, {function: 'tiny_rewards:short_is_good', weight: 2}]"
    result, recorder = run(job, tmp_path / "run", f"reward={rewards}")
    assert "Calibrate the rewards on held-out prompts" in recorder.done
    store = RolloutStore.read(tmp_path / "run" / "rollouts" / "evaluation-reference")
    combined = next(key for key in store.reward_sources if key.startswith("combined"))
    ids = sorted(store.present())
    score_PK = store.rewards_PK(combined, ids, 4)
    assert ((score_PK >= 0) & (score_PK <= 1)).all()
    assert len(store.reward_sources) == 3
    assert result["results"][0]["reward"].startswith("1 × tiny_rewards:vowels")
    assert (tmp_path / "run" / "report.html").exists()
    _, again = run(job, tmp_path / "run", f"reward={rewards}")
    assert not again.done


def test_unscored_rollouts_take_no_part_in_calibration(job, tmp_path):
    """`sometimes` gives no reward to about 1 in 29: counted, reported, and never a number."""
    settings = ["reward.function=tiny_rewards:sometimes", "rollouts.num_ref=16"]
    recipe = load_recipe(job / "recipe.yaml", settings)
    pipeline = Pipeline(recipe, tmp_path / "run", Recorder())
    counts = pipeline.run("rollout")
    assert 0 < counts["unscored"] < 0.05 * counts["rollouts"], "the seed gives some"
    text = pipeline.run("calibrate")["text"]
    assert f"{counts['unscored']} unscored rollouts take no part" in text
    calibrator = RewardCalibrator.load(tmp_path / "run" / "calibration" / "calibrator")
    assert calibrator.num_ref_P.sum() == counts["rollouts"] - counts["unscored"]


def test_reference_rollouts_can_come_from_a_server(job, tmp_path):
    """Any OpenAI-compatible server; where it is and how many requests run do not count as a change."""
    asked = []

    def answer(number, path, content, headers):
        asked.append(content)
        return choices(content)

    with Server(answer) as server:
        settings = [f"rollouts.endpoint={{url: '{server.url}', model: served}}", "reward.function=tiny_rewards:letters"]
        result, _ = run(job, tmp_path / "run", *settings, only="rollout")
        assert result["rollouts"] == 16
        assert asked[0]["model"] == "served"
        assert asked[0]["max_tokens"] == 4
        drawn = server.count
        _, again = run(job, tmp_path / "run", *settings, "rollouts.endpoint.concurrency=2", only="rollout")
        assert not again.done
        assert server.count == drawn
    store = RolloutStore.read(tmp_path / "run" / "rollouts" / "reference")
    assert store.key.model == "served:served"
    assert store.table(["text"])["text"].to_pylist()[0].startswith("Say ")
