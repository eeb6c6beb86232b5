"""Faults that a reader of the code found: each with what is right instead."""

import pytest

from infalign._io.http import Endpoint
from infalign.calibration import calibrator, combined
from infalign.errors import InfalignError, InputError, RewardError
from infalign.reshape import Reshaping
from infalign.rewards.rehearsal import rehearse
from infalign.rewards.source import HTTPReward, SequenceClassificationReward
from infalign.rollouts.policy_file import read_policy_file
from infalign.rollouts.prompts import Prompt, load_prompts
from infalign.run.recipe import Recipe
from infalign.run.testbed.toy import random_llama
from tests.rollouts.faulty_server import FaultyServer, answered

DEEP = "[" * 100_000
KEY = "hunter2-short-key"


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("policy.json", lambda path: read_policy_file(path.parent)),
        ("prompts.jsonl", load_prompts),
        ("calibrator.json", lambda path: calibrator.RewardCalibrator.load(path.parent)),
        ("calibrator.json", lambda path: combined.CombinedCalibrator.load(path.parent)),
        ("reshaping.json", Reshaping.load),
    ],
)
def test_deep_json_is_an_error_of_the_file(tmp_path, name, read):
    (tmp_path / name).write_text(DEEP + "\n")
    with pytest.raises(InfalignError):
        read(tmp_path / name)


def test_a_rehearsed_server_does_not_make_us_show_the_key(monkeypatch):
    monkeypatch.setenv("REVIEW_KEY", KEY)
    with FaultyServer(answered(200, {"rewards": [f"Bearer {KEY}", 1.0]})) as server:
        reward = HTTPReward(Endpoint(server.url, "REVIEW_KEY", timeout=5), name="judge")
        with pytest.raises(RewardError) as caught:
            rehearse(reward, [Prompt("p")], "reward")
    assert KEY not in str(caught.value)


@pytest.mark.parametrize("where", ["reward", "gold"])
def test_two_servers_do_not_share_a_name(where):
    first, other = ({"url": f"http://localhost:{port}", "name": "judge"} for port in (1, 2))
    content = {
        "name": "t",
        "policy": {"model": "m"},
        "prompts": {"source": "p.jsonl"},
        "procedure": "best-of-4",
        "kl_budget": 0.5,
        "reward": [first, other] if where == "reward" else first,
        "evaluation": {} if where == "reward" else {"gold": [other]},
    }
    with pytest.raises(ValueError, match="two rewards with different urls are called judge"):
        Recipe.model_validate(content)


def test_tokens_beyond_a_rewards_embeddings_are_named(tmp_path):
    from transformers import AutoTokenizer

    random_llama(tmp_path / "judge", spread=1.0, max_length=32, seed=2, reward_model=True)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "judge")
    tokenizer.add_tokens(["<word>"])
    tokenizer.save_pretrained(tmp_path / "judge")
    reward = SequenceClassificationReward(str(tmp_path / "judge"))
    assert len(reward.score(["a"], ["b"])) == 1
    with pytest.raises(InputError, match="<word>"):
        reward.score(["a"], ["<word>"])
