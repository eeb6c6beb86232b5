"""Nothing that lies in a folder from elsewhere is run, and nobody is asked, unless the command line says so."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from infalign.errors import InputError
from infalign.integrations.trl import load_transformed_reward
from infalign.run.stages.planned import PlannedMethod
from infalign.run.stages.run import open_run
from infalign.run.stages.trust import Trust
from tests.runs import infalign
from tests.serving.conftest import RECIPE

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")
EVIL = """
from pathlib import Path
Path(__file__).with_name("executed").write_text("")
def f(prompts, completions):
    return [1.0 for _ in completions]
"""


@pytest.fixture
def elsewhere(run_folder, tmp_path, monkeypatch):
    """A copy of a run, beside it a module that leaves a trace when it is imported; and one that changes the recipe."""
    shutil.copytree(run_folder, tmp_path / "run")
    (tmp_path / "evil.py").write_text(EVIL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    recipe = tmp_path / "run" / "recipe.json"

    def change(section, **settings):
        content = json.loads(recipe.read_text())
        place = content[section][0] if section == "reward" else content[section]
        place |= settings
        recipe.write_text(json.dumps(content))

    return tmp_path, change


VERBS = {
    "serve-reward": ["serve-reward", "run", "--port", "0"],
    "evaluate": ["evaluate", "--run", "run"],
    "decode": ["decode", "Hi", "--model", "absent", "--n", "2", "--calibration", "run"],
    "serve": ["serve", "--model", "absent", "--n", "2", "--calibration", "run", "--port", "0"],
    "reshape": ["reshape", "run"],
}


@pytest.mark.parametrize(
    ("section", "settings", "message", "option"),
    [
        ("reward", {"function": "evil:f"}, "import and run the function evil:f (reward)", "--trust-run"),
        (
            "reward",
            {"function": None, "url": "http://127.0.0.1:9/", "name": "judge", "api_key_variable": "HF_TOKEN"},
            "send prompts and responses to judge (reward.url)",
            "--trust-run",
        ),
        ("policy", {"trust_remote_code": True}, "(policy.trust_remote_code)", "--trust-remote-code"),
        ("policy", {"allow_pickle": True}, "(policy.allow_pickle)", "--allow-pickle"),
        ("reward", {"trust_remote_code": True}, "(reward.trust_remote_code)", "--trust-remote-code"),
        ("reward", {"allow_pickle": True}, "(reward.allow_pickle)", "--allow-pickle"),
    ],
)
@pytest.mark.parametrize("verb", VERBS)
def test_a_run_folder_asks_for_nothing_by_itself(
    elsewhere, capfd, monkeypatch, verb, section, settings, message, option
):
    folder, change = elsewhere
    change(section, **settings)
    model = json.loads((folder / "run/recipe.json").read_text())["policy"]["model"]
    command = [model if one == "absent" else one for one in VERBS[verb]]
    others = [one for one in ("--trust-run", "--trust-remote-code", "--allow-pickle") if one != option]
    code, _, told = infalign(capfd, monkeypatch, *command, *others)
    told = " ".join(told.split())
    assert (code, message in told, f"Add {option} if" in told) == (2, True, True), told
    assert not (folder / "executed").exists()
    assert "evil" not in sys.modules


def test_gold_rewards_of_a_run_too(elsewhere, capfd, monkeypatch):
    folder, change = elsewhere
    change("evaluation", gold=[{"function": "evil:f"}])
    command = ["evaluate", "--run", "run", "--model", "absent", "--reward", "served_rewards:vowels"]
    code, _, told = infalign(capfd, monkeypatch, *command)
    assert (code, "evaluation.gold f" in told) == (2, True), told
    assert not (folder / "executed").exists()


def test_the_command_line_gives_the_permission(elsewhere):
    folder, change = elsewhere
    change("reward", function="evil:f")
    with pytest.raises(InputError, match="import and run"):
        open_run(folder / "run")
    run = open_run(folder / "run", Trust(rewards=True))
    assert run.rewards.source().key.startswith("evil:f")
    assert (folder / "executed").exists()
    sys.modules.pop("evil", None)


def test_a_script_opens_functions_but_nothing_that_a_model_brings(elsewhere):
    folder, change = elsewhere
    load_transformed_reward(folder / "run")
    change("policy", trust_remote_code=True)
    with pytest.raises(InputError, match="--trust-remote-code"):
        load_transformed_reward(folder / "run")
    load_transformed_reward(folder / "run", trust=Trust(rewards=True, remote_code=True))


def test_a_reward_named_on_the_command_line_stands_for_itself(elsewhere, capfd, monkeypatch):
    """The run's own reward is then not opened: only compared by the keys that its rollouts hold."""
    folder, change = elsewhere
    model = json.loads((folder / "run/recipe.json").read_text())["policy"]["model"]
    change("reward", function="evil:f")
    command = ["decode", "Hi", "--model", model, "--n", "2", "--calibration", "run", "--max-new-tokens", "2", "--json"]
    code, out, told = infalign(capfd, monkeypatch, *command, "--reward", "served_rewards:vowels")
    assert code == 0, told
    assert json.loads(out)["answered"] == 1
    assert not (folder / "executed").exists()


def test_trust_without_a_run_is_idle(capfd, monkeypatch):
    for command in (
        ["decode", "Hi", "--model", "m", "--n", "2"],
        ["serve", "--model", "m"],
        ["evaluate", "--model", "m"],
    ):
        code, _, told = infalign(capfd, monkeypatch, *command, "--trust-run")
        assert (code, "--trust-run does nothing without" in told) == (2, True), told


@pytest.mark.parametrize("name", ["../../x", "/tmp/x", "a/b", "", ".hidden", "..", None, 3])
def test_a_plan_names_folders_in_the_run(name):
    with pytest.raises(InputError, match=r"plan\.json: .*cannot be the name of a file"):
        PlannedMethod.from_dict({"name": name, "beta": 1.0, "transform": {"kind": "identity"}})


def test_files_beside_a_recipe_do_not_stand_for_libraries(tmp_path, run_folder):
    """Every library that is loaded, and some that are not installed; the reward function beside them is found."""
    job = run_folder.parent
    for name in ("policy", "prompts.jsonl", "served_rewards.py"):
        os.symlink(job / name, tmp_path / name)
    trace = "from pathlib import Path; Path(__file__).with_suffix('.executed').write_text('')\nraise SystemExit(3)\n"
    for name in ("peft", "torch", "transformers", "yaml", "typer", "rich", "numpy", "datasets", "wandb", "pydantic"):
        (tmp_path / f"{name}.py").write_text(trace)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    arguments = [str(tmp_path / "recipe.yaml"), "--dry-run", "--out", str(tmp_path / "run")]
    done = subprocess.run(
        [sys.executable, "-m", "infalign", "run", *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.glob("*.executed")) == []


def test_a_function_hidden_by_a_library_is_said(tmp_path, monkeypatch):
    from infalign.rewards.source import import_function

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "json.py").write_text("def judge(prompts, completions): ...\n")
    with pytest.raises(InputError, match=r"json\.py is hidden by the installed module json"):
        import_function("json:judge")
