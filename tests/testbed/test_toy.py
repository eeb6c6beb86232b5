import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from infalign.errors import InputError
from infalign.run.testbed.toy import random_llama


def test_words(tmp_path):
    folder = random_llama(tmp_path / "toy", 30)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert len(tokenizer) == model.config.vocab_size == 30
    inputs = tokenizer(["a b", "z aa ab"], return_tensors="pt", padding=True)
    assert inputs["input_ids"].tolist() == [[0, 2, 3], [27, 28, 29]]
    assert tokenizer.batch_decode(inputs["input_ids"], skip_special_tokens=True) == ["a b", "z aa ab"]
    written = model.generate(**inputs, do_sample=False, max_new_tokens=4)
    assert written.shape[0] == 2


def test_bytes(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(random_llama(tmp_path / "toy"))
    assert len(tokenizer) == 258
    assert tokenizer.decode(tokenizer("any\ntext: é🙂")["input_ids"]) == "any\ntext: é🙂"


def test_reward_model(tmp_path):
    folder = random_llama(tmp_path / "toy", reward_model=True)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer.padding_side = "right"
    with torch.no_grad():
        together = model(**tokenizer(["a", "a longer text"], return_tensors="pt", padding=True)).logits
        alone = model(**tokenizer(["a"], return_tensors="pt")).logits
    assert together.shape == (2, 1)
    torch.testing.assert_close(together[:1], alone)


def test_spread_is_the_spread_of_the_logits(tmp_path):
    ids = torch.arange(2, 52).reshape(5, 10)
    for spread in (0.0, 0.5, 3.0):
        model = AutoModelForCausalLM.from_pretrained(random_llama(tmp_path / str(spread), 500, spread=spread))
        with torch.no_grad():
            measured = model(ids).logits.std(-1).mean().item()
        assert measured == pytest.approx(spread, rel=0.15)


def test_seeded(tmp_path):
    weights = [
        (random_llama(tmp_path / name, 9, seed=seed) / "model.safetensors").read_bytes()
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    ]
    assert weights[0] == weights[1] != weights[2]


@pytest.mark.parametrize("arguments", [{"vocab_size": 2}, {"hidden_size": 15}])
def test_refuses(arguments, tmp_path):
    with pytest.raises(InputError):
        random_llama(tmp_path / "toy", **arguments)
