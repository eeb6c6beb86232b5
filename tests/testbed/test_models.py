import hashlib
import json
import math
import os
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from infalign.errors import InputError, StorageError
from infalign.run.testbed import models
from infalign.run.testbed.examples import Example, Pair
from infalign.run.testbed.models import ReferenceSpec, RewardSpec, train_reference, train_reward_model
from infalign.run.testbed.tokenizer import EOS_TOKEN, PAD_TOKEN, train_tokenizer

COLOURS = ["red", "green", "blue", "black", "white", "brown"]
THINGS = ["car", "tree", "door", "shoe", "hat", "cup", "bird", "lamp"]
SPEC = ReferenceSpec(
    vocab_size=300,
    hidden_size=32,
    num_layers=1,
    num_heads=2,
    epochs=30,
    batch_size=16,
    learning_rate=1e-2,
    max_length=40,
)
REWARD_SPEC = RewardSpec(epochs=12, batch_size=16, learning_rate=5e-3, max_length=40)

SHORT = ReferenceSpec(
    vocab_size=260, hidden_size=8, num_layers=1, num_heads=2, epochs=1, batch_size=8, learning_rate=1e-3, max_length=16
)


def _examples():
    """A task with a simple answer: repeat the colour. Every eighth thing-colour combination is held out."""
    pairs = [(colour, thing) for thing in THINGS for colour in COLOURS]
    return [
        Example(f"{colour} {thing}\n", f"It is {colour}.", held_out=i % 8 == 5, source=f"{thing}.{colour}")
        for i, (colour, thing) in enumerate(pairs)
    ]


def _pairs():
    return [
        Pair(e.prompt, e.completion, rejected, kind, e.held_out)
        for e in _examples()
        for kind, rejected in (("cut", e.completion[:-1]), ("noise", "".join(reversed(e.completion))))
    ]


def _weights(folder):
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A reference and a reward model, with what training told about its progress."""
    folder = tmp_path_factory.mktemp("models")
    told = []
    reference = train_reference(_examples(), folder / "ref", spec=SPEC, seed=1, progress=lambda *a: told.append(a))
    reward = train_reward_model(_pairs(), folder / "ref", folder / "rm", spec=REWARD_SPEC, seed=1)
    return reference, reward, told


@pytest.mark.parametrize("text", ["json.dumps(obj)\nSerialize it.", "  two  spaces", "été 中文 🙂", "a\r\n\tb", ""])
def test_tokenizer_represents_every_text(text, tmp_path):
    train_tokenizer(["some text", "other text"] * 5, 280, max_length=50).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert tokenizer.pad_token_id not in ids
    assert tokenizer.eos_token_id not in ids
    assert (tokenizer.pad_token, tokenizer.eos_token) == (PAD_TOKEN, EOS_TOKEN)
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert (tokenizer.padding_side, tokenizer.model_max_length) == ("left", 50)


def test_tokenizer_refuses_a_vocabulary_without_room_for_bytes():
    with pytest.raises(InputError, match="257"):
        train_tokenizer(["text"], 257)


def test_reference_learns_the_task_and_to_stop(trained):
    reference, _, told = trained
    assert (reference.train_examples, reference.held_out_examples, reference.truncated) == (42, 6, 0)
    assert reference.held_out_loss is not None
    assert reference.held_out_perplexity == pytest.approx(math.exp(reference.held_out_loss))
    assert reference.held_out_perplexity < 1.5
    steps = SPEC.epochs * math.ceil(42 / SPEC.batch_size)
    assert [t[:2] for t in told] == [(i + 1, steps) for i in range(steps)]

    tokenizer = AutoTokenizer.from_pretrained(reference.path)
    model = AutoModelForCausalLM.from_pretrained(reference.path).eval()
    held_out = [e for e in _examples() if e.held_out]
    inputs = tokenizer([e.prompt for e in held_out], return_tensors="pt", padding=True)
    written = model.generate(**inputs, max_new_tokens=20, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    assert (written == tokenizer.eos_token_id).any(1).all()
    texts = tokenizer.batch_decode(written, skip_special_tokens=True)
    assert sum(t == e.completion for t, e in zip(texts, held_out, strict=True)) >= 5


def test_held_out_loss_is_per_completion_token_with_the_end_token(trained):
    """One example at a time, no padding: an oracle for the padded, masked batches."""
    reference, _, _ = trained
    tokenizer = AutoTokenizer.from_pretrained(reference.path)
    model = AutoModelForCausalLM.from_pretrained(reference.path).eval()
    total = count = 0
    for example in (e for e in _examples() if e.held_out):
        prompt_ids = tokenizer(example.prompt)["input_ids"]
        ids = [*prompt_ids, *tokenizer(example.completion)["input_ids"], tokenizer.eos_token_id]
        with torch.no_grad():
            logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        total -= sum(logprobs[i - 1, ids[i]].item() for i in range(len(prompt_ids), len(ids)))
        count += len(ids) - len(prompt_ids)
    assert reference.held_out_loss == pytest.approx(total / count, rel=1e-4)


def test_reward_model_prefers_the_true_text(trained):
    _, reward, _ = trained
    assert (reward.train_pairs, reward.held_out_pairs, reward.truncated) == (84, 12, 0)
    by_kind = reward.held_out_accuracy_by_kind
    assert set(by_kind) == {"cut", "noise"}
    assert reward.held_out_accuracy == pytest.approx((by_kind["cut"] + by_kind["noise"]) / 2)
    assert reward.held_out_accuracy >= 11 / 12

    tokenizer = AutoTokenizer.from_pretrained(reward.path)
    model = AutoModelForSequenceClassification.from_pretrained(reward.path).eval()
    right = 0
    for pair in (p for p in _pairs() if p.held_out):  # one text at a time, no padding
        with torch.no_grad():
            chosen, rejected = (
                model(**tokenizer(pair.prompt + text, return_tensors="pt")).logits.item()
                for text in (pair.chosen, pair.rejected)
            )
        right += chosen > rejected
    assert reward.held_out_accuracy == pytest.approx(right / 12)


def test_folders_are_ordinary_and_complete(trained):
    for result in trained[:2]:
        names = set(os.listdir(result.path))
        assert {"config.json", "model.safetensors", "tokenizer.json", "metrics.json"} <= names
        assert not [n for n in os.listdir(result.path.parent) if "partial" in n]
        stored = json.loads((result.path / "metrics.json").read_text())
        assert stored["parameters"] == result.parameters
        assert stored["seed"] == 1
    assert stored["held_out_accuracy_by_kind"] == trained[1].held_out_accuracy_by_kind
    assert stored["spec"]["learning_rate"] == REWARD_SPEC.learning_rate


def test_same_seed_same_weights(tmp_path):
    references, rewards = [], []
    for i in range(2):
        torch.manual_seed(i)  # whatever the caller drew before
        references.append(train_reference(_examples(), tmp_path / f"ref{i}", spec=SHORT, seed=1))
        torch.rand(3)
        spec = RewardSpec(epochs=1, batch_size=16, max_length=16)
        rewards.append(train_reward_model(_pairs(), references[i].path, tmp_path / f"rm{i}", spec=spec, seed=1))
    assert _weights(references[0].path) == _weights(references[1].path)
    assert references[0].held_out_loss == references[1].held_out_loss
    assert _weights(rewards[0].path) == _weights(rewards[1].path)


def test_other_seed_other_weights_and_an_earlier_folder_is_replaced(tmp_path):
    examples = [e for e in _examples() if not e.held_out][:8]
    first = train_reference(examples, tmp_path / "ref", spec=SHORT, seed=1)
    assert first.held_out_loss is None
    weights = _weights(first.path)
    train_reference(examples, tmp_path / "ref", spec=SHORT, seed=2)
    assert _weights(first.path) != weights


def test_long_texts_are_cut_and_counted(tmp_path):
    text = "abcdefghijklmnopqrstuvwxyz0123456789"  # no pair occurs twice, so no merges: one token per character
    examples = [Example("pq\n", text[:n], held_out=n == 36) for n in (3, 12, 13, 36)]
    reference = train_reference(examples[:1] + examples[2:], tmp_path / "ref", spec=replace(SHORT, vocab_size=258))
    assert reference.truncated == 2
    reference = train_reference(examples, tmp_path / "ref", spec=replace(SHORT, vocab_size=258))
    assert reference.truncated == 2  # 3 + 12 + 1 fits exactly
    tokenizer = AutoTokenizer.from_pretrained(reference.path)

    short = models._supervised_row(tokenizer, Example("12345678abcdefghijkl", "xyz"), 16)  # prompt cut on the left
    assert tokenizer.decode(short["input_ids"]) == "abcdefghijklxyz" + EOS_TOKEN
    assert [label != -100 for label in short["labels"]] == [False] * 12 + [True] * 4
    long = models._supervised_row(tokenizer, Example("abcdefghij", "0123456789xyz"), 16)  # both cut; no end token
    assert tokenizer.decode(long["input_ids"]) == "cdefghij01234567"
    assert tokenizer.eos_token_id not in long["input_ids"]

    pairs = [Pair("p", "c" * n, "d", held_out=n == 20) for n in (5, 20, 30)]
    spec = RewardSpec(epochs=1, batch_size=2, max_length=16)
    reward = train_reward_model(pairs, reference.path, tmp_path / "rm", spec=spec)
    assert (reward.truncated, reward.train_pairs, reward.held_out_pairs) == (2, 2, 1)  # none dropped
    kept = AutoTokenizer.from_pretrained(reward.path)("abc" * 10, truncation=True)["input_ids"]
    assert tokenizer.decode(kept) == ("abc" * 10)[-16:]  # the end counts, as in training


def test_reward_model_of_its_own_size(tmp_path):
    reference = train_reference([e for e in _examples() if not e.held_out][:8], tmp_path / "ref", spec=SHORT)
    spec = RewardSpec(epochs=1, batch_size=8, max_length=16, hidden_size=12, num_layers=1, num_heads=3)
    reward = train_reward_model(_pairs()[:8], reference.path, tmp_path / "rm", spec=spec)
    assert AutoModelForSequenceClassification.from_pretrained(reward.path).config.hidden_size == 12
    assert reward.held_out_accuracy is None
    assert reward.held_out_accuracy_by_kind == {}


def test_an_interrupted_stage_leaves_nothing_behind(tmp_path):
    def stop(done, total, text):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_reference(_examples(), tmp_path / "ref", spec=SHORT, progress=stop)
    assert list(tmp_path.iterdir()) == []


def test_bad_input_is_refused(tmp_path):
    with pytest.raises(InputError, match="no example to train on"):
        train_reference([Example("a", "b", held_out=True)], tmp_path / "ref", spec=SHORT)
    with pytest.raises(InputError, match="no pair to train on"):
        train_reward_model([], tmp_path, tmp_path / "rm")
    with pytest.raises(StorageError, match="not a model folder"):
        train_reward_model(_pairs(), tmp_path / "nothing", tmp_path / "rm")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(StorageError, match="something else"):
        train_reference(_examples(), tmp_path / "mine", spec=SHORT)
    assert (tmp_path / "mine" / "thesis.txt").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError):
        train_reference(_examples(), tmp_path / "file" / "ref", spec=SHORT)
