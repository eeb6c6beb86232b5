"""The command line: exit codes, one plain message, JSON alone on stdout."""

import json
import subprocess
import sys

import pytest

from infalign.run.testbed.toy import random_llama
from tests.runs import infalign

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")

RECIPE = """
name: demo
policy: {model: policy}
reward: {function: "demo_rewards:length"}
prompts: {source: prompts.jsonl, train: 4, evaluation: 4, held_out: 0.5}
rollouts: {num_ref: 4, max_new_tokens: 4}
kl_budget: 0.2
"""


def write_prompts(folder, prompts):
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))


@pytest.fixture
def job(tmp_path, monkeypatch):
    random_llama(tmp_path / "policy", None, hidden_size=16)
    write_prompts(tmp_path, [f"Number {i}: " for i in range(20)])
    (tmp_path / "demo_rewards.py").write_text(
        "def length(prompts, completions):\n    return [len(c) for c in completions]\n"
        "def graded(prompts, completions, answer):\n    return [len(a) for a in answer]\n"
    )
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))  # the command adds the recipe's folder
    monkeypatch.delitem(sys.modules, "demo_rewards", raising=False)
    return tmp_path


def change(job, old, new):
    text = (job / "recipe.yaml").read_text()
    assert old in text
    (job / "recipe.yaml").write_text(text.replace(old, new))


def add(job, line):
    (job / "recipe.yaml").write_text(RECIPE + line + "\n")


def pickle_weights(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def cut(path):
    path.write_bytes(path.read_bytes()[:1000])


def without(path, key):
    content = json.loads(path.read_text())
    del content[key]
    path.write_text(json.dumps(content))


def test_dry_run_prints_the_plan_and_computes_nothing(job, capsys, monkeypatch):
    code, out, _ = infalign(capsys, monkeypatch, "run", "recipe.yaml", "--dry-run")
    assert code == 0
    assert "Procedure: Best-of-4; transforms: optimal, identity; KL budget 0.2 nats" in out
    assert "Training memory" in out
    assert not (job / "runs").exists()


def test_dry_run_as_json_is_json_alone(job, capsys, monkeypatch):
    code, out, _ = infalign(capsys, monkeypatch, "run", "recipe.yaml", "--dry-run", "--json")
    assert code == 0
    numbers = json.loads(out)
    assert numbers["reference_rollouts"] == 16
    assert numbers["parameters"] > 1000


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda job: (job / "recipe.yaml").unlink(), "cannot read the recipe"),
        (lambda job: (job / "prompts.jsonl").unlink(), "prompts.jsonl"),
        (lambda job: (job / "prompts.jsonl").write_text('{"text": "a"}\n'), "prompt"),
        (lambda job: (job / "prompts.jsonl").write_text('{"prompt": " "}\n'), "the prompt is empty"),
        (lambda job: write_prompts(job, [f"{i} " + "x" * 500 for i in range(20)]), "context"),
        (lambda job: (job / "prompts.jsonl").write_bytes(b'{"prompt": "\xff"}\n'), "UTF-8"),
        (
            lambda job: write_prompts(job, [[{"role": "user", "content": f"Number {i}"}] for i in range(20)]),
            "no chat template",
        ),
        (lambda job: write_prompts(job, ["only one"]), "no prompt falls on the"),
        (lambda job: (job / "policy" / "tokenizer.json").unlink(), "tokenizer"),
        (lambda job: (job / "policy" / "config.json").unlink(), "no model can be read"),
        (lambda job: (job / "demo_rewards.py").unlink(), "cannot be imported"),
        (lambda job: (job / "recipe.yaml").write_text(RECIPE + "trainig: {}\n"), "did you mean training?"),
        (lambda job: (job / "recipe.yaml").write_text(RECIPE.replace("num_ref: 4", "num_ref: 1")), "num_ref"),
        (lambda job: (job / "recipe.yaml").write_text(RECIPE.replace("kl_budget: 0.2", "beta: 0")), "beta"),
        (
            lambda job: (job / "prompts.jsonl").write_text(
                '{"prompt": "text"}\n' * 1
                + '{"prompt": [{"role": "user", "content": "a"}]}\n' * 1
                + "".join(json.dumps({"prompt": f"{i}"}) + "\n" for i in range(20))
            ),
            "some prompts are text and some are chat messages",
        ),
        (lambda job: pickle_weights(job / "policy"), "policy.allow_pickle"),
        (lambda job: cut(job / "policy" / "model.safetensors"), "model.safetensors is damaged"),
        (lambda job: (job / "policy" / "adapter_config.json").write_text("{}"), "alignment starts from full weights"),
        (lambda job: without(job / "policy" / "tokenizer_config.json", "eos_token"), "end-of-sequence token"),
        (lambda job: change(job, "model: policy", "model: ./polcy"), "there is no such folder"),
        (lambda job: change(job, 'function: "demo_rewards:length"', "model: policy"), "has 2 outputs"),
        (
            lambda job: change(job, "demo_rewards:length", "demo_rewards:graded"),
            "missing a required argument: 'answer'",
        ),
        (lambda job: (job / "demo_rewards.py").write_text("1 / 0"), "ZeroDivisionError"),
        (lambda job: change(job, "kl_budget: 0.2", "kl_budget: 50"), "out of reach"),
        (lambda job: change(job, "kl_budget: 0.2", "beta: 1.0e-9"), "1e-09"),
        (lambda job: add(job, "transform: {file: absent.json}"), "cannot read the transform"),
        (lambda job: add(job, "training: {lora: {rank: 4}}"), "training.lora"),
        (lambda job: add(job, "training: {rloo: {lerning_rate: 1}}"), "lerning_rate"),
        (lambda job: add(job, "training: {rloo: {max_steps: 1}}"), "Set training.steps instead"),
        (lambda job: (job / "runs").write_text("a file where the run folder should go"), "cannot be written"),
    ],
)
def test_what_a_user_can_mend_is_one_message_and_exit_code_2(job, capsys, monkeypatch, spoil, message):
    spoil(job)
    code, out, err = infalign(capsys, monkeypatch, "run", "recipe.yaml")
    assert code == 2
    assert out == ""
    assert message in err.replace("\n", " ")
    assert "Traceback" not in err
    assert err.count("error:") == 1


def test_a_report_of_what_is_not_there_is_no_matter_of_recipes_alone(job, capsys, monkeypatch):
    for arguments in (("report", "nothere"), ("report", "nothere", "--format", "md"), ("report", "nothere.yaml")):
        code, _, err = infalign(capsys, monkeypatch, *arguments)
        assert code == 2
        assert "there is no run folder and no recipe of this name" in " ".join(err.split())


DECODERS = """
def right(*, model, tokenizer, prompts, max_new_tokens, seed):
    return list(prompts)
def loose(prompts, **settings):
    return list(prompts)
def seedless(model, tokenizer, prompts, max_new_tokens):
    return list(prompts)
def greedy(model, tokenizer, prompts, max_new_tokens, seed, beams):
    return list(prompts)
def graded(prompts, completions, answer):
    return [0.0 for _ in completions]
"""


@pytest.mark.parametrize(
    ("decoder", "message"),
    [
        ('"demo_decoders:right"', None),
        ('"demo_decoders:loose"', None),
        ('"demo_decoders:seedless"', "decoder demo_decoders:seedless: it cannot be called as a decoder is (got an"),
        ('"demo_decoders:greedy"', "missing a required argument: 'beams'"),
        ('"demo_decoders:absent"', "decoder demo_decoders:absent: the function cannot be imported"),
        ('{proxy: "demo_decoders:graded", n: 2}', "missing a required argument: 'answer'"),
        ('{proxy: "./absent", n: 2}', "there is no such folder"),
    ],
)
def test_a_decoder_that_cannot_be_called_is_found_by_a_dry_run(job, capsys, monkeypatch, decoder, message):
    monkeypatch.delitem(sys.modules, "demo_decoders", raising=False)
    (job / "demo_decoders.py").write_text(DECODERS)
    add(job, f"procedure: {{kind: fitted, decoder: {decoder}}}")
    code, _, err = infalign(capsys, monkeypatch, "run", "recipe.yaml", "--dry-run")
    assert code == (0 if message is None else 2), err
    assert message is None or message in " ".join(err.split())


def test_an_unknown_verb_or_option_is_exit_code_2(capsys, monkeypatch):
    assert infalign(capsys, monkeypatch, "rnu")[0] == 2
    assert infalign(capsys, monkeypatch, "run", "--fast")[0] == 2


def test_import_is_light():
    """The names load on first use: no torch, no transformers, no SciPy for a bare import."""
    code = "import sys, infalign; print([m for m in ('torch', 'transformers', 'trl', 'scipy') if m in sys.modules])"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "[]"


def test_version():
    printed = subprocess.run(
        [sys.executable, "-m", "infalign", "--version"], capture_output=True, text=True, check=True
    )
    assert printed.stdout.strip()
