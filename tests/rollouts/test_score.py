"""Reward sources: one number per response, or a reason why not."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

from infalign.audit.attempts import JudgedAsAsked
from infalign.errors import InputError, RewardError
from infalign.rewards.combined import CombinedReward
from infalign.rewards.score import FunctionReward, SequenceClassificationReward, score_store
from infalign.rollouts.key import RolloutKey
from infalign.rollouts.prompts import Prompt
from infalign.rollouts.store import RolloutStore
from infalign.run.testbed.toy import random_llama


def lengths(prompts, completions):
    return [float(len(completion)) for completion in completions]


async def lengths_later(prompts, completions, answer):
    return [len(completion) - a for completion, a in zip(completions, answer, strict=True)]


@pytest.fixture
def store(tmp_path):
    store = RolloutStore.open(tmp_path / "store", RolloutKey("m", "t", 4, 0))
    prompts = [Prompt(f"prompt {i}", {"prompt": f"prompt {i}", "answer": i}) for i in range(4)]
    for prompt in prompts:
        texts = ["", "a", "bb", "ccc", "dddd"]
        store.append(
            {
                "prompt_id": [prompt.id] * 5,
                "index": list(range(5)),
                "text": texts,
                "token_ids": [[1]] * 5,
                "logprob": [0.0] * 5,
                "num_tokens": [1] * 5,
                "finish_reason": ["stop"] * 5,
            }
        )
    return store, prompts


def test_functions_score_a_store_once(store):
    store, prompts = store
    ids = [prompt.id for prompt in prompts]
    source = FunctionReward(lengths)
    seen = []
    assert score_store(store, source, prompts[:2], lambda *s: seen.append(s[:2]), chunk_size=3) == 10
    assert seen == [(0, 10), (3, 10), (6, 10), (9, 10), (10, 10)]
    assert score_store(store, source, prompts) == 10
    assert score_store(store, source, prompts) == 0
    assert store.rewards_PK(source.key, ids, 5).tolist() == [[0, 1, 2, 3, 4]] * 4
    with_answer = FunctionReward(lengths_later)
    score_store(store, with_answer, prompts)
    assert store.rewards_PK(with_answer.key, ids, 5)[3].tolist() == [-3, -2, -1, 0, 1]
    assert source.key in str(store.reward_sources)


def test_a_function_by_its_name(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text(
        "def short(completions, **columns):\n    return [-len(c) for c in completions]\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "my_rewards", raising=False)  # another test's
    source = FunctionReward("my_rewards:short")
    assert source.score(["p"], ["abc"], answer=[1]).tolist() == [-3.0]
    assert source.key.startswith("my_rewards:short@")
    assert str(source) == "my_rewards:short"
    for bad in ("my_rewards", "my_rewards:", "my_rewards:none", "no_such_module:f", "my_rewards:__name__"):
        with pytest.raises(InputError, match="function"):
            FunctionReward(bad)


def test_a_changed_function_is_another_source():
    def make(code):
        return FunctionReward(code).key

    def one(prompts, completions):
        return [1.0 for _ in completions]

    def two(prompts, completions):
        return [2.0 for _ in completions]

    two.__qualname__ = one.__qualname__
    assert make(one) != make(two)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1.0], "1 reward for 2 completions"),
        ([1.0, float("nan")], "row 1: the reward is nan"),
        ([float("inf"), 1.0], "row 0: the reward is inf"),
        ([1.0, "high"], "row 1: the reward is 'high', not a number"),
        (3.0, "returned a float, not a list"),
    ],
)
def test_what_is_not_one_number_each_stops(values, message):
    with pytest.raises(RewardError, match=message) as caught:
        FunctionReward(lambda prompts, completions: values, key="mine").score(["p", "q"], ["a", "b"])
    assert "mine" in str(caught.value)


def test_arrays_and_tensors_are_numbers():
    for make in (np.array, torch.tensor):
        source = FunctionReward(lambda prompts, completions, make=make: make([1.0, 2.0]), key="array")
        assert source.score(["p", "q"], ["a", "b"]).tolist() == [1.0, 2.0]
        scalars = FunctionReward(lambda prompts, completions, make=make: list(make([1.0, 2.0])), key="scalars")
        assert scalars.score(["p", "q"], ["a", "b"]).tolist() == [1.0, 2.0]


def test_rows_that_fail_are_unscored_and_counted(store):
    store, prompts = store

    def picky(prompts, completions):
        if "" in completions:
            raise ValueError("nothing to judge")
        return [None if completion == "a" else len(completion) for completion in completions]

    source = FunctionReward(picky)
    with pytest.raises(RewardError, match=r"8 of 20 rollouts could not be scored \(ValueError: nothing to judge"):
        score_store(store, source, prompts)
    score_store(store, source, prompts, max_unscored=0.5)
    table = store.rewards(source.key).to_pylist()
    assert [row["reward"] for row in table[:5]] == [None, None, 2.0, 3.0, 4.0]
    assert [row["error"] for row in table[:3]] == ["ValueError: nothing to judge", "it returned no reward", None]
    with pytest.raises(InputError, match="8 of 20 rollouts could not be scored"):
        store.rewards_PK(source.key, [prompt.id for prompt in prompts], 5)
    # What was scored is not scored again; what was not is tried again on request.
    assert score_store(store, source, prompts, max_unscored=0.5) == 0
    assert score_store(store, source, prompts, max_unscored=0.5, retry_unscored=True) == 8
    with pytest.raises(InputError, match="no rollouts of these prompts"):
        score_store(store, source, [Prompt("unknown")])


def test_a_reward_model_scores_text_in_one_piece(reward_model):
    source = SequenceClassificationReward(reward_model, batch_size=3)
    prompts = ["p", "a longer prompt", "q", "", "z" * 200]
    completions = ["", "fine", "a very much longer completion", "", "end"]
    together = source.score(prompts, completions)
    assert source.num_truncated == 1
    model = AutoModelForSequenceClassification.from_pretrained(reward_model)
    tokenizer = AutoTokenizer.from_pretrained(reward_model)
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        ids = tokenizer(prompt + completion)["input_ids"][-64:] or [tokenizer.eos_token_id]
        with torch.no_grad():
            alone = model(torch.tensor([ids])).logits.item()
        assert together[row] == pytest.approx(alone, abs=1e-5)
    ended = SequenceClassificationReward(reward_model, append_end_token=True)
    assert ended.score(["p"], ["x"])[0] == pytest.approx(source.score(["p"], ["x" + tokenizer.eos_token])[0], abs=1e-6)
    assert len({source.key, ended.key, SequenceClassificationReward(reward_model, max_length=9).key}) == 3
    assert SequenceClassificationReward(reward_model, batch_size=1).key == source.key


def test_a_reward_model_with_another_tokenizer_or_template_is_another_source(tmp_path):
    first, other = (Path(random_llama(tmp_path / name, reward_model=True, max_length=64)) for name in ("one", "two"))
    key = SequenceClassificationReward(first).key
    assert SequenceClassificationReward(other).key == key, "wherever it lies"
    (other / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    templated = SequenceClassificationReward(other).key
    (other / "chat_template.jinja").unlink()
    tokenizer = AutoTokenizer.from_pretrained(other)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(other)
    assert len({key, templated, SequenceClassificationReward(other).key}) == 3


def test_a_reward_model_scores_messages_through_its_template(tmp_path, reward_model):
    chat = [{"role": "user", "content": "Hi"}]
    source = SequenceClassificationReward(reward_model)
    with pytest.raises(InputError, match="no chat template"):
        source.score([chat], ["there"])
    tokenizer = AutoTokenizer.from_pretrained(reward_model)
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    AutoModelForSequenceClassification.from_pretrained(reward_model).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    source = SequenceClassificationReward(tmp_path)
    written = source.score(["<user>Hi<assistant>"], ["there"])
    assert source.score([chat], ["there"]) == pytest.approx(written)
    assert source.score([chat], [[{"role": "assistant", "content": "there"}]]) == pytest.approx(written)


def test_models_that_are_no_reward_models(tmp_path, letters):
    with pytest.raises(InputError, match="no model weights"):
        SequenceClassificationReward(tmp_path)
    config = LlamaConfig(vocab_size=258, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
                         num_labels=2, pad_token_id=0)  # fmt: skip
    LlamaForSequenceClassification(config).save_pretrained(tmp_path / "two")
    letters.tokenizer.save_pretrained(tmp_path / "two")
    with pytest.raises(InputError, match="2 outputs"):
        SequenceClassificationReward(tmp_path / "two").score(["a"], ["b"])
    torch.save({}, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text((tmp_path / "two" / "config.json").read_text())
    letters.tokenizer.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="no sequence-classification model"):
        SequenceClassificationReward(tmp_path).score(["a"], ["b"])


def test_a_reward_model_that_overflows_is_named(tmp_path):
    path = random_llama(tmp_path, reward_model=True, max_length=64)
    model = AutoModelForSequenceClassification.from_pretrained(path)
    with torch.no_grad():
        model.score.weight.fill_(float("nan"))
    model.save_pretrained(path)
    with pytest.raises(RewardError, match="nan for 2 responses, the first is row 0"):
        SequenceClassificationReward(path).score(["a", "b"], ["c", "d"])


def test_a_model_by_its_folder(tmp_path, monkeypatch):
    for folder in ("helpful", "aligned/model", "other/helpful"):
        random_llama(tmp_path / folder, 5, reward_model=True)
    named = [SequenceClassificationReward(tmp_path / one) for one in ("helpful", "aligned/model")]
    assert [str(source) for source in named] == ["helpful", "aligned"]
    assert str(JudgedAsAsked(named[0])) == "helpful"
    monkeypatch.chdir(tmp_path / "aligned" / "model")
    assert str(SequenceClassificationReward(".")) == "aligned"
    alike = CombinedReward([named[0], SequenceClassificationReward(tmp_path / "other" / "helpful")], [1, 0.5])
    assert str(alike) == "1 × helpful + 0.5 × helpful (2)"
