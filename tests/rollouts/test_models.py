"""Models that are not whole are refused, never completed with random weights."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from infalign.errors import InputError
from infalign.rewards.source import FunctionReward, SequenceClassificationReward
from infalign.rollouts.models import load_policy
from infalign.rollouts.prompts import Prompt
from infalign.rollouts.sample import sample
from infalign.run.testbed.quiet import quiet
from infalign.run.testbed.toy import random_llama

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")


def test_a_reward_model_is_no_policy(tmp_path):
    with pytest.raises(InputError, match=r"lm_head\.weight"):
        load_policy(random_llama(tmp_path, reward_model=True))


def test_a_language_model_is_no_reward_model(tmp_path):
    folder = random_llama(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config |= {"id2label": {"0": "score"}, "label2id": {"score": 0}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"score\.weight"):
        SequenceClassificationReward(folder).score(["a"], ["b"])


def test_tied_weights_are_not_missing(tmp_path):
    folder = random_llama(tmp_path / "untied")
    model, tokenizer = load_policy(folder)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    with quiet():
        model.save_pretrained(tmp_path / "tied")
        tokenizer.save_pretrained(tmp_path / "tied")
    tied, _ = load_policy(tmp_path / "tied")
    assert tied.get_output_embeddings().weight is tied.get_input_embeddings().weight


def test_weights_of_other_shapes_are_refused(tmp_path):
    folder = random_llama(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 48}))
    with pytest.raises(InputError, match="other shapes"):
        load_policy(folder)


def test_a_policy_that_is_not_numbers_is_refused(tmp_path):
    folder = random_llama(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    with quiet():
        model.save_pretrained(folder)
    model, tokenizer = load_policy(folder)
    with pytest.raises(InputError, match="logits are not numbers"):
        sample(
            model, tokenizer, [Prompt("a")], 2, store=tmp_path / "store", model_name=folder, max_new_tokens=2, seed=0
        )


def test_a_function_that_cannot_be_called_says_so_beforehand():
    def graded(prompts, completions, answer): ...

    FunctionReward(graded).require_columns(["answer", "other"])
    with pytest.raises(InputError, match="missing a required argument: 'answer'"):
        FunctionReward(graded).require_columns(["other"])
    with pytest.raises(InputError, match="does not tell its parameters"):
        FunctionReward(max)
