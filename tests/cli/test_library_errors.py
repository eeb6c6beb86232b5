"""What libraries would say late, or as a traceback, is said by --dry-run in one message, with a hint that works."""

import json
import shutil
import sys

import pytest
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from infalign.errors import InputError
from infalign.rollouts.template_errors import explaining
from infalign.run.testbed.toy import random_llama
from tests.runs import infalign

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")
RECIPE = """
name: library
policy: {model: policy}
reward: {function: "library_rewards:one"}
prompts: {source: prompts.jsonl, train: 8, evaluation: 4}
procedure: best-of-4
kl_budget: 0.2
rollouts: {num_ref: 4, max_new_tokens: 4}
"""
TEMPLATE = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% endfor %}<|assistant|>"
)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    where = tmp_path_factory.mktemp("models")
    random_llama(where / "policy", spread=1.0, max_length=96, seed=1)
    random_llama(where / "judge", spread=1.0, max_length=96, seed=2, reward_model=True)
    base = AutoModelForSequenceClassification.from_pretrained(where / "policy", num_labels=1)
    adapted = get_peft_model(base, LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["q_proj"]))
    adapted.save_pretrained(where / "adapter")
    AutoTokenizer.from_pretrained(where / "policy").save_pretrained(where / "adapter")
    return where


@pytest.fixture
def job(models, tmp_path, monkeypatch):
    for name in ("policy", "judge", "adapter"):
        shutil.copytree(models / name, tmp_path / name)
    (tmp_path / "library_rewards.py").write_text(
        "def one(prompts, completions):\n"
        "    return [len(c if isinstance(c, str) else c[0]['content']) for c in completions]\n"
    )
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    write_prompts(tmp_path, [f"Number {i}: " for i in range(40)])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "library_rewards", raising=False)
    return tmp_path


def write_prompts(folder, prompts):
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": one}) + "\n" for one in prompts))


def chat(*roles):
    return [[{"role": role, "content": f"{role} {i}"} for role in roles] for i in range(40)]


def add_token(folder, **special):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens(special) if special else tokenizer.add_tokens(["<word>"])
    tokenizer.save_pretrained(folder)


def dry_run(capsys, monkeypatch, *settings):
    code, out, err = infalign(
        *(capsys, monkeypatch, "run", "recipe.yaml", "--dry-run"), *(f for one in settings for f in ("--set", one))
    )
    return code, out, " ".join(err.split())


def test_a_template_that_raises(job, capsys, monkeypatch):
    (job / "policy" / "chat_template.jinja").write_text(TEMPLATE)
    write_prompts(job, chat("user"))
    assert dry_run(capsys, monkeypatch)[0] == 0
    write_prompts(job, chat("system", "user"))
    code, _, told = dry_run(capsys, monkeypatch)
    assert (code, "refuses these messages (System role not supported)" in told) == (2, True), told
    command = ["decode", "--prompts", "prompts.jsonl", "--model", "policy", "--n", "2", "--max-new-tokens", "2"]
    code, _, told = infalign(capsys, monkeypatch, *command, "--reward", "library_rewards:one")
    assert (code, "System role not supported" in told) == (2, True), told


def test_a_template_of_the_reward_that_raises(job, capsys, monkeypatch):
    (job / "policy" / "chat_template.jinja").write_text(
        TEMPLATE.replace("raise_exception('System role not supported')", "''")
    )
    (job / "judge" / "chat_template.jinja").write_text(TEMPLATE)
    write_prompts(job, chat("system", "user"))
    code, _, told = dry_run(capsys, monkeypatch, "reward={model: judge}")
    assert (code, "System role not supported" in told, "judge" in told) == (2, True, True), told


@pytest.mark.parametrize(
    "template", ["{{ messages[7]['content'] }}", "{{ 1 / 0 }}", "{% if %}", "{{ 'a' + 1 }}", "{% include 'x' %}"]
)
def test_templates_that_fail_in_any_other_way(job, capsys, monkeypatch, template):
    (job / "policy" / "chat_template.jinja").write_text(template)
    write_prompts(job, chat("user"))
    code, _, told = dry_run(capsys, monkeypatch)
    assert (code, "chat template refuses these messages" in told) == (2, True), told


def test_an_error_of_ours_passes_through():
    def fail():
        with explaining(None):
            raise InputError("ours")

    with pytest.raises(InputError, match=r"^ours$"):
        fail()


def test_tokens_without_embeddings(job, capsys, monkeypatch):
    add_token(job / "policy")
    assert dry_run(capsys, monkeypatch)[0] == 0  # nobody uses it
    write_prompts(job, [f"Number {i}: <word>" for i in range(40)])
    code, _, told = dry_run(capsys, monkeypatch)
    assert (code, "('<word>'), and the model has embeddings for" in told) == (2, True), told
    write_prompts(job, [f"Number {i}" for i in range(40)])
    add_token(job / "policy", eos_token="<end>")
    code, _, told = dry_run(capsys, monkeypatch)
    assert (code, "every response 0 holds token number" in told or "<end>" in told) == (2, True), told


def test_tokens_that_the_reward_has_no_embedding_for(job, capsys, monkeypatch):
    add_token(job / "judge")
    write_prompts(job, [f"Number {i}: <word>" for i in range(40)])
    code, _, told = dry_run(capsys, monkeypatch, "reward={model: judge}")
    assert (code, "judge" in told, "('<word>')" in told) == (2, True, True), told


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ("{r: 4, target_modules: [query, value]}", "the model has no module 'query' (target_modules)"),
        ("{r: 4, target_modules: 'no_such.*'}", "PEFT does not take these settings"),
        ("{r: 4, target_modules: [q_proj], modules_to_save: [heads]}", "the model has no module 'heads'"),
        ("{r: -1, target_modules: [q_proj]}", "training.lora"),
        ("{rank: 4}", "training.lora"),
    ],
)
def test_lora_settings_that_do_not_fit(job, capsys, monkeypatch, lora, message):
    code, _, told = dry_run(capsys, monkeypatch, f"training.lora={lora}")
    assert (code, message in told) == (2, True), told
    if "query" in lora:
        assert "down_proj, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj" in told


@pytest.mark.parametrize(
    "lora", ["{r: 4}", "{r: 4, target_modules: all-linear}", "{r: 4, target_modules: [q_proj], use_dora: true}"]
)
def test_lora_settings_that_fit(job, capsys, monkeypatch, lora):
    code, _, told = dry_run(capsys, monkeypatch, f"training.lora={lora}")
    assert code == 0, told


def test_lora_on_the_testbed(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    recipe = "name: t\ntestbed: {corpus: docstrings}\nprocedure: best-of-4\nkl_budget: 0.2\n"
    (tmp_path / "recipe.yaml").write_text(recipe)
    assert dry_run(capsys, monkeypatch, "training.lora={r: 4, target_modules: [q_proj]}")[0] == 0
    code, _, told = dry_run(capsys, monkeypatch, "training.lora={r: 4, target_modules: [c_attn]}")
    assert (code, "no module 'c_attn'" in told) == (2, True), told


def test_a_reward_that_is_an_adapter_on_a_causal_base(job, capsys, monkeypatch):
    code, _, told = dry_run(capsys, monkeypatch, "reward={model: adapter}")
    assert code == 0, told
    base = AutoModelForSequenceClassification.from_pretrained(job / "policy", num_labels=3)
    adapted = get_peft_model(base, LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["q_proj"]))
    adapted.save_pretrained(job / "adapter")
    code, _, told = dry_run(capsys, monkeypatch, "reward={model: adapter}")
    assert (code, "the model has 3 outputs" in told) == (2, True), told
    (job / "adapter" / "adapter_model.safetensors").unlink()
    code, _, told = dry_run(capsys, monkeypatch, "reward={model: adapter}")
    assert (code, "no adapter weights" in told) == (2, True), told
