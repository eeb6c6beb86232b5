"""Adapters of every kind give what PEFT itself gives, alone and beside others on one base; or are refused."""

import json
import shutil

import numpy as np
import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    IA3Config,
    LoHaConfig,
    LoraConfig,
    PeftModel,
    PromptTuningConfig,
    get_peft_model,
)
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from infalign.errors import InputError, StorageError
from infalign.rewards.source import SequenceClassificationReward
from infalign.rollouts.models import load_policy, load_tokenizer
from infalign.rollouts.opening import open_policies, open_policy
from infalign.rollouts.prompts import Prompt
from infalign.rollouts.store import RolloutStore
from infalign.run.testbed.toy import random_llama

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")
TASK = {"task_type": "CAUSAL_LM"}
LORA = {**TASK, "r": 4, "target_modules": ["q_proj", "v_proj"]}
KINDS = {
    "lora": LoraConfig(**LORA),
    "dora": LoraConfig(**LORA, use_dora=True),
    "rslora": LoraConfig(**LORA, use_rslora=True),
    "bias": LoraConfig(**LORA, modules_to_save=["norm"]),
    "head": LoraConfig(**LORA, modules_to_save=["lm_head"]),
    "tokens": LoraConfig(**LORA, trainable_token_indices=[5, 6]),
    "loha": LoHaConfig(**LORA),
    "ia3": IA3Config(**TASK, target_modules=["k_proj"], feedforward_modules=[]),
    "resized": LoraConfig(**LORA),
    "resized-trained": LoraConfig(**LORA, modules_to_save=["embed_tokens", "lm_head"]),
}


def disturb(model, seed):
    """Every weight that is trained away from where it starts, so that one that is not loaded is noticed."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(torch.randn_like(weight) * 0.3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    where = tmp_path_factory.mktemp("adapters")
    base = random_llama(where / "base", spread=1.0, max_length=96, seed=1)
    for seed, (name, config) in enumerate(KINDS.items()):
        model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
        if name.startswith("resized"):
            tokenizer.add_tokens(["<new>", "<other>"])
            model.resize_token_embeddings(len(tokenizer))
        adapted = get_peft_model(model, config)
        disturb(adapted, seed)
        adapted.save_pretrained(where / name)
        tokenizer.save_pretrained(where / name)
    return where


def logits(model, size):
    with torch.inference_mode():
        return model(input_ids=torch.arange(3, size).reshape(1, -1)).logits.double().numpy()


@pytest.mark.parametrize("name", KINDS)
def test_what_peft_gives(folder, name):
    expected = AutoPeftModelForCausalLM.from_pretrained(folder / name).eval()
    size = 262 if name.startswith("resized") else 90
    size = min(size, expected.get_input_embeddings().weight.shape[0] if name.startswith("resized") else size)
    model, _ = load_policy(folder / name)
    np.testing.assert_allclose(logits(model, size)[..., :size], logits(expected, size)[..., :size], atol=1e-5)


@pytest.mark.parametrize("name", KINDS)
def test_beside_the_base_and_another_adapter(folder, name):
    """Log-probabilities of one policy are the same whatever else is open, in whatever order."""
    ids = [[70, 71, 72], [80, 5, 6]], [[73, 74, 75], [5, 6]]
    alone = {one: open_policy(folder / one).logprobs(*ids) for one in ("base", "lora", name)}
    for order in (("base", "lora", name), (name, "lora", "base")):
        together = open_policies([folder / one for one in order])
        for one, policy in zip(order, together, strict=True):
            np.testing.assert_allclose(policy.logprobs(*ids), alone[one], atol=1e-5)
    if name != "lora":
        assert np.abs(alone[name] - alone["base"]).max() > 1e-4


def spoiled(folder, tmp_path, change):
    shutil.copytree(folder / "dora", tmp_path / "bad")
    weights = load_file(tmp_path / "bad" / "adapter_model.safetensors")
    save_file(change(weights), tmp_path / "bad" / "adapter_model.safetensors")
    return tmp_path / "bad"


def test_a_missing_part_is_said(folder, tmp_path):
    def without_magnitudes(weights):
        return {name: value for name, value in weights.items() if "magnitude" not in name}

    bad = spoiled(folder, tmp_path, without_magnitudes)
    for models in ([bad], [folder / "base", bad]):
        with pytest.raises(InputError, match=r"does not fit its base model .*magnitude"):
            open_policies(models)


def test_a_part_that_nothing_takes_and_one_of_another_shape(folder, tmp_path):
    bad = spoiled(
        folder, tmp_path, lambda weights: {name.replace("q_proj", "z_proj"): w for name, w in weights.items()}
    )
    with pytest.raises(InputError, match="does not fit its base model"):
        open_policy(bad)
    shutil.rmtree(bad)
    bad = spoiled(folder, tmp_path, lambda weights: {name: torch.cat([w, w]) for name, w in weights.items()})
    with pytest.raises(InputError, match="does not fit its base model"):
        open_policy(bad)


def test_kinds_that_cannot_share_a_model_and_damaged_files(folder, tmp_path):
    adapted = get_peft_model(
        AutoModelForCausalLM.from_pretrained(folder / "base"), PromptTuningConfig(**TASK, num_virtual_tokens=2)
    )
    adapted.save_pretrained(tmp_path / "prompt")
    load_tokenizer(folder / "base").save_pretrained(tmp_path / "prompt")
    with pytest.raises(InputError, match="PROMPT_TUNING change the prompt"):
        open_policy(tmp_path / "prompt")
    shutil.copytree(folder / "lora", tmp_path / "damaged")
    (tmp_path / "damaged" / "adapter_config.json").write_text("{}")
    with pytest.raises(StorageError, match=r"adapter_config\.json: it does not say which model it adapts"):
        open_policy(tmp_path / "damaged")
    (tmp_path / "damaged" / "adapter_config.json").write_text((folder / "lora" / "adapter_config.json").read_text())
    (tmp_path / "damaged" / "adapter_model.safetensors").write_bytes(b"half")
    with pytest.raises(InputError, match="weights cannot be read"):
        open_policy(tmp_path / "damaged")
    (tmp_path / "damaged" / "adapter_model.safetensors").unlink()
    with pytest.raises(InputError, match=r"no adapter weights|no model weights"):
        open_policy(tmp_path / "damaged")


def test_a_reward_model_that_is_an_adapter_on_a_causal_base(folder, tmp_path):
    base = AutoModelForSequenceClassification.from_pretrained(folder / "base", num_labels=1)
    adapted = get_peft_model(base, LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["q_proj"], use_dora=True))
    disturb(adapted, 1)
    adapted.save_pretrained(tmp_path / "reward")
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    tokenizer.save_pretrained(tmp_path / "reward")
    again = AutoModelForSequenceClassification.from_pretrained(folder / "base", num_labels=1)
    again.config.pad_token_id = tokenizer.pad_token_id
    expected = PeftModel.from_pretrained(again, tmp_path / "reward").eval()
    with torch.inference_mode():
        scores = [float(expected(**tokenizer(text, return_tensors="pt")).logits[0, 0]) for text in ("Say x", "Say yy")]
    found = SequenceClassificationReward(str(tmp_path / "reward")).score(["Say ", "Say "], ["x", "yy"])
    np.testing.assert_allclose(found, scores, atol=1e-5)
    config = json.loads((tmp_path / "reward" / "adapter_config.json").read_text())
    assert config["task_type"] == "SEQ_CLS"


def test_tokens_beyond_the_embeddings(folder, tmp_path):
    shutil.copytree(folder / "base", tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    size = AutoModelForCausalLM.from_pretrained(folder / "base").get_input_embeddings().weight.shape[0]
    assert len(tokenizer) == size
    tokenizer.add_special_tokens({"pad_token": "<pad-beyond>"})
    tokenizer.save_pretrained(tmp_path / "model")
    _, loaded = load_policy(tmp_path / "model")  # padding is never looked at
    assert loaded.pad_token_id == loaded.eos_token_id
    tokenizer.add_tokens(["<word>"])
    tokenizer.save_pretrained(tmp_path / "model")
    policy = open_policy(tmp_path / "model")
    store = RolloutStore.open(tmp_path / "store", policy.key(max_new_tokens=3, seed=0))
    assert policy.draw([Prompt("Say ")], 2, store=store) == 2
    assert np.isfinite(policy.logprobs([[70]], [[71]])).all()
    with pytest.raises(InputError, match=r"prompt 1 holds token number \d+, and the model has embeddings for"):
        policy.draw([Prompt("Say "), Prompt("Say <word>")], 2, store=store)
    with pytest.raises(InputError, match=r"response 0 holds token number \d+ \('<word>'\)"):
        policy.logprobs([[70]], [[size + 1]])
    tokenizer.add_special_tokens({"eos_token": "<end-beyond>"})
    tokenizer.save_pretrained(tmp_path / "model")
    with pytest.raises(InputError, match="<end-beyond>"):
        load_policy(tmp_path / "model")


@pytest.mark.parametrize("base", [".", "./", "", " ", "a\x00b", "\u202ex", 3, None, ["x"]])
def test_a_policy_file_that_names_itself_or_nothing(tmp_path, base):
    content = {"kind": "mixture", "base": base, "aligned": "x", "weights": [0.5]}
    (tmp_path / "policy.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"not a description of a policy .*(names no model|several models itself)"):
        open_policy(tmp_path)
