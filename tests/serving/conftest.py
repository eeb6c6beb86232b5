"""A real, tiny, calibrated run, made once."""

import json
import sys

import openai
import pytest

from infalign.run.pipeline import Pipeline
from infalign.run.recipe import load_recipe
from infalign.run.testbed.toy import random_llama
from tests.runs import Recorder
from tests.serving.process import Served

RECIPE = """
name: served
policy: {model: policy}
reward: {function: "served_rewards:vowels"}
prompts: {source: prompts.jsonl, train: 6, evaluation: 2, held_out: 0.3}
procedure: best-of-4
transform: {exponential: 10}
compare_with: [identity, self-consistent]
rollouts: {num_ref: 8, max_new_tokens: 12}
beta: 0.5
training: {prompts_per_step: 2, num_generations: 4}
"""
REWARDS = """
def vowels(prompts, completions, note=None):
    texts = [one if isinstance(one, str) else one[-1]["content"] for one in completions]
    rows = zip(texts, note or [""] * len(completions), strict=True)
    return [sum(c in "aeiou" for c in text) + len(text) / 100 + len(n) for text, n in rows]
"""
USER = {"role": "user", "content": "Say 2"}
LENGTH = 8
TEMPLATE = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% endfor %}<|assistant|>"


def make_run(folder, *, chat=False):
    """Calibrate a byte-level toy policy on a handful of prompts; returns the run folder."""
    random_llama(folder / "policy", spread=1.0, max_length=96, seed=4)
    if chat:
        (folder / "policy" / "chat_template.jinja").write_text(TEMPLATE)
    rows = []
    for number in range(12):
        prompt = f"Say {number}: "
        content = [{"role": "user", "content": prompt}] if chat else prompt
        rows.append({"prompt": content, "note": "x" * number})
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "served_rewards.py").write_text(REWARDS)
    (folder / "recipe.yaml").write_text(RECIPE)
    recipe = load_recipe(folder / "recipe.yaml")
    for only in ("rollout", "calibrate"):
        Pipeline(recipe, folder / "run", Recorder()).run(only)
    return folder / "run"


@pytest.fixture(scope="session")
def importable(tmp_path_factory):
    """The reward function's module, importable."""
    folder = tmp_path_factory.mktemp("module")
    (folder / "served_rewards.py").write_text(REWARDS)
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))
    sys.modules.pop("served_rewards", None)


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory, importable):
    return make_run(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="session")
def chat_run_folder(tmp_path_factory, importable):
    return make_run(tmp_path_factory.mktemp("chat"), chat=True)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A chat policy on bytes, and reward functions."""
    where = tmp_path_factory.mktemp("serve")
    random_llama(where / "policy", spread=1.0, max_length=96, seed=4)
    (where / "policy" / "chat_template.jinja").write_text(
        "{% if messages[0]['content'] == 'provoke' %}{{ raise_exception('no provocation') }}{% endif %}" + TEMPLATE
    )
    (where / "serve_rewards.py").write_text(
        "def vowels(prompts, completions):\n"
        "    texts = [one if isinstance(one, str) else one[-1]['content'] for one in completions]\n"
        "    return [float(sum(c in 'aeiou' for c in text)) for text in texts]\n"
        "def numbers(prompts, completions):\n"
        "    texts = [one if isinstance(one, str) else one[-1]['content'] for one in completions]\n"
        "    return [None if 'unscorable' in str(p) else float(c) for p, c in zip(prompts, texts)]\n"
        "def graded(prompts, completions, answer):\n"
        "    return [0.0 for _ in completions]\n"
    )
    return where


def serve(folder, *more, **settings):
    model = ("--model", folder / "policy", "--max-new-tokens", LENGTH)
    return Served("serve", *model, "--reward", "serve_rewards:vowels", "--n", 4, *more, cwd=folder, **settings)


@pytest.fixture(scope="session")
def served(folder):
    with serve(folder, "--seed", 7, "--queue", 48) as server:
        with openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client:
            server.first = client.chat.completions.create(model="policy", messages=[USER])
        yield server
