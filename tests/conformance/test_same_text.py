"""A reward is shown the same at every stage: one form, one text, whatever the tokenizer and the verb."""

import json
import sys
import textwrap

import pytest
from starlette.testclient import TestClient
from transformers import AutoTokenizer

from infalign.integrations.reward_app import make_reward_app
from infalign.integrations.trl import TrainerReward
from infalign.procedures import BestOfN
from infalign.rewards.source import FunctionReward
from infalign.rollouts.opening import open_policy
from infalign.rollouts.tokens import prompt_token_ids
from infalign.run.pipeline import Pipeline
from infalign.run.recipe import load_recipe
from infalign.run.stages.run import open_run
from infalign.select.decoder import Decoder
from infalign.select.local import sampler_of
from infalign.select.serving.app import ProcedureServer, Served
from tests.conformance.families import FAMILIES, SAID, make_policy
from tests.runs import Recorder, infalign

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")

MODULE = "recorded_reward"
REWARD = """
import json
SHOWN = []

def said(completion):
    return completion if isinstance(completion, str) else completion[-1]["content"]

def length(prompts, completions):
    return [float(len(text)) for text in completions]

def recorded(prompts, completions, note, **more):
    SHOWN.extend(json.dumps([p, c, n, sorted(more)]) for p, c, n in zip(prompts, completions, note, strict=True))
    rewards = [float("the" in said(one)) for one in completions]
    for one in prompts + completions:
        if not isinstance(one, str):
            one.append({"role": "user", "content": "spoilt"})  # what it does with its arguments is its own affair
    return rewards
"""
RECIPE = """
name: same
policy: {model: policy}
reward: {function: "recorded_reward:recorded"}
prompts: {source: prompts.jsonl, evaluation_source: held_out.jsonl, train: 2, evaluation: 2}
procedure: best-of-2
transform: identity
compare_with: []
rollouts: {num_ref: 8, max_new_tokens: 3}
beta: 10.0
training: {steps: 1, prompts_per_step: 2, num_generations: 8, learning_rate: 1.0e-9}
evaluation: {num_samples: 8, procedures: [standard, best-of-2]}
"""
ASKED = ["the cat", "say one", "a dog", "say two"]


def rows_of(kind):
    for number, text in enumerate(ASKED):
        messages = [{"role": "user", "content": text, **({"name": "ann"} if number == 1 else {})}]
        yield {"prompt": text if kind == "text" else messages, "note": {"n": number, "at": None}}


def expected(rows):
    """What must be shown, in the form of TRL."""
    found = set()
    for row in rows:
        for said in SAID:
            completion = said if isinstance(row["prompt"], str) else [{"role": "assistant", "content": said}]
            found.add(json.dumps([row["prompt"], completion, row["note"], ["prompt_id"]]))
    return found


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / f"{MODULE}.py").write_text(textwrap.dedent(REWARD))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop(MODULE, None)
    __import__(MODULE)
    yield sys.modules[MODULE]
    sys.modules.pop(MODULE, None)


def taken(module):
    """What was shown since the last call, but for the sample responses of `--dry-run`."""
    found = {row for row in module.SHOWN if "Yes." not in row and "42" not in row}
    module.SHOWN.clear()
    return found


@pytest.mark.parametrize("kind", ["text", "chat"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_verb_shows_a_reward_the_same_rows(family, kind, module, tmp_path, capfd, monkeypatch):
    make_policy(family, tmp_path / "policy")
    rows = list(rows_of(kind))
    for name, part in (("prompts", rows[:2]), ("held_out", rows[2:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    train, held_out = expected(rows[:2]), expected(rows[2:])
    recipe, run, reward = load_recipe(tmp_path / "recipe.yaml"), tmp_path / "run", f"{MODULE}:recorded"

    Pipeline(recipe, run, Recorder()).check()
    rehearsed = [json.loads(row) for row in module.SHOWN]
    assert rehearsed[0][0] == rehearsed[1][0] in [row["prompt"] for row in rows[:2]], "two responses to a prompt"
    assert len(rehearsed) == 2
    assert taken(module) == set()
    for group, shown in (("rollout", train), ("calibrate", set()), ("train", train), ("evaluate", held_out)):
        Pipeline(recipe, run, Recorder()).run(group)
        assert taken(module) == shown, group

    model = str(tmp_path / "policy")
    common = ("--prompts", "prompts.jsonl", "--reward", reward)
    drawn = ("--max-new-tokens", 3, "--model")
    calls = {
        "decode": ("decode", *common, "--procedure", "best-of-16", "--out", "answers.jsonl", *drawn, model),
        "evaluate": ("evaluate", *common, "--samples", 8, "--procedures", "best-of-2", "--reference", model,
                     "--allow-overlap", "--out", "evaluation", *drawn, f"other={run / 'policies/identity/model'}"),
        "audit": ("audit", *common, "--threshold", 0.5, "--augment", "none", "--attempts", 16, "--out", "audit",
                  *drawn, f"other={model}"),
    }  # fmt: skip
    for name, arguments in calls.items():
        code, _, err = infalign(capfd, monkeypatch, *arguments)
        assert code == 0, err
        assert taken(module) == train, name

    policy = open_policy(model)
    known = {prompt.id: prompt for prompt in open_run(run, rewards=False).prompts("train")}
    decoder = Decoder(sampler_of(policy, max_new_tokens=3), FunctionReward(reward), BestOfN(16))
    server = ProcedureServer(Served(decoder, "m", 3, known=known))
    with TestClient(server.app, base_url="http://localhost") as client:
        for row in rows[:2]:
            if kind == "chat" and "name" in row["prompt"][0]:
                continue  # a request cannot bring it
            path, field = ("completions", "prompt") if kind == "text" else ("chat/completions", "messages")
            assert client.post(f"/v1/{path}", json={"model": "m", field: row["prompt"]}).status_code == 200
    server.stop()
    assert taken(module) == (train if kind == "text" else expected(rows[:1])), "serve"

    app, batcher = make_reward_app(TrainerReward(run), capacity=64, timeout=60, batch_size=8)
    tokenizer = AutoTokenizer.from_pretrained(model)
    with TestClient(app, base_url="http://localhost") as client:
        for prompt in known.values():
            text = prompt.prompt if kind == "text" else tokenizer.apply_chat_template(
                prompt.prompt, add_generation_prompt=True, tokenize=False
            )  # fmt: skip
            ids = prompt_token_ids(tokenizer, [prompt])[0]
            for said in SAID:
                words = tokenizer("cat" + said, add_special_tokens=False)["input_ids"][-1:]
                for end in (3, 4):
                    bare = tokenizer(text, add_special_tokens=False)["input_ids"]
                    queries = {
                        "whole": tokenizer.decode([*ids, *words, end], skip_special_tokens=False),
                        "bare": tokenizer.decode([*bare, *words, end], skip_special_tokens=False),
                        "apart": text + tokenizer.decode([*words, end], skip_special_tokens=False),
                    }
                    for name, query in queries.items():
                        answer = client.post("/get_reward", json={"query": [query], "prompts": [text]})
                        assert answer.status_code == 200, (name, answer.json())
    batcher.stop()
    assert taken(module) == train, "serve-reward"


@pytest.mark.parametrize("verb", ["run", "decode", "audit", "evaluate"])
def test_a_reward_on_the_length_of_a_text_is_no_constant_on_chat(verb, module, tmp_path, capfd, monkeypatch):
    make_policy("gpt2", tmp_path / "policy")
    for name, part in (("prompts", slice(2)), ("held_out", slice(2, 4))):
        lines = [json.dumps(row) + "\n" for row in list(rows_of("chat"))[part]]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    (tmp_path / "recipe.yaml").write_text(RECIPE.replace("recorded_reward:recorded", "recorded_reward:length"))
    common = ("--prompts", "prompts.jsonl", "--reward", f"{MODULE}:length", "--model", tmp_path / "policy")
    arguments = {
        "run": ("recipe.yaml", "--dry-run"),
        "decode": (*common, "--procedure", "best-of-2"),
        "audit": (*common, "--threshold", 2, "--out", "audit"),
        "evaluate": (*common, "--reference", tmp_path / "policy", "--out", "evaluation"),
    }[verb]
    code, _, err = infalign(capfd, monkeypatch, verb, *arguments)
    assert code == 2
    assert "without reading what it says" in err.replace("\n", " ")
    assert "completion[-1]['content'] is its text" in err.replace("\n", " ")
