"""Decoders that a recipe can name: what they return on models whose every response can be enumerated."""

import itertools

import numpy as np
import pytest
import torch

from infalign.errors import InputError, RewardError
from infalign.procedures import BestOfN
from infalign.procedures.measured import MeasuredProcedure
from infalign.rollouts.key import RolloutKey, tokenizer_fingerprint
from infalign.rollouts.prompts import Prompt
from infalign.rollouts.store import RolloutStore
from infalign.select.black_box import decoder_key, run_decoder
from tests.responses import said

PROMPTS = [Prompt("a"), Prompt("c a b"), Prompt("b b")]
HERE = "tests.rollouts.test_black_box"


def many_bs(prompts, completions):
    return [float(text.split().count("b")) for text in completions]


def unscored(prompts, completions):
    return [None] * len(completions)


def echo(model, tokenizer, prompts, max_new_tokens, seed):
    return [f"{prompt}|{seed}|{max_new_tokens}" for prompt in prompts]


def too_few(model, tokenizer, prompts, max_new_tokens, seed):
    return ["one"]


def run(toy, path, decoder, count=1, length=3, prompts=PROMPTS):
    procedure = MeasuredProcedure.parse({"kind": "fitted", "decoder": decoder, "rollouts_per_prompt": count})
    key = RolloutKey("toy", tokenizer_fingerprint(toy.tokenizer), length, 5, sampler=decoder_key(procedure))
    store = RolloutStore.open(path, key)
    made = run_decoder(procedure, toy.model, toy.tokenizer, prompts, store=store)
    assert run_decoder(procedure, toy.model, toy.tokenizer, prompts, store=store) == 0, "nothing twice"
    return made, np.array(store.lists_PK("text", [prompt.id for prompt in prompts], count))


def probabilities(toy, prompt, length):
    """Every response of at most `length` tokens with its probability."""
    found = {}
    start = toy.tokenizer(prompt, return_tensors="pt").input_ids[0].tolist()
    end = toy.tokenizer.eos_token_id
    with torch.inference_mode():
        for tokens in itertools.product(range(5), repeat=length):
            total = 0.0
            for at, token in enumerate(tokens):
                logits = toy.model(torch.tensor([start + list(tokens[:at])])).logits[0, -1].double()
                total += float(torch.log_softmax(logits, -1)[token])
                if token == end:
                    tokens = tokens[: at + 1]
                    break
            found[tokens] = np.exp(total)
    return found


def test_the_widest_beam_finds_the_likeliest_response(words, tmp_path):
    # With as many beams as there are prefixes of one token, two tokens are searched exhaustively. The library divides
    # the log-probability by the length, so that is what the enumeration maximises.
    _, texts = run(words, tmp_path, {"beam": 5}, length=2)
    end = words.tokenizer.eos_token_id
    for prompt, text in zip(PROMPTS, texts[:, 0], strict=True):
        every = probabilities(words, prompt.prompt, 2)
        best = max(every, key=lambda tokens: np.log(every[tokens]) / len(tokens))
        assert text == said(words.tokenizer, prompt.prompt, [t for t in best if t != end])


def test_the_best_of_n_by_a_proxy(words, tmp_path):
    made, texts = run(words, tmp_path, {"proxy": f"{HERE}:many_bs", "n": 3}, count=150, length=2, prompts=PROMPTS[:1])
    assert made == 150
    every = probabilities(words, PROMPTS[0].prompt, 2)
    b = words.tokenizer.convert_tokens_to_ids("b")
    cdf = np.cumsum([sum(p for tokens, p in every.items() if tokens.count(b) == k) for k in range(3)])
    expected = np.diff(BestOfN(3).distortion(np.minimum(cdf, 1.0)), prepend=0.0)
    said = np.bincount([text.split().count("b") for text in texts[0]], minlength=3) / 150
    # 5 standard errors in each of three cells: false alarm rate under 2e-6.
    assert (np.abs(said - expected) < 5 * np.sqrt(expected * (1 - expected) / 150) + 1e-9).all()


def test_a_nucleus_leaves_unlikely_words_out(words, tmp_path):
    _, texts = run(words, tmp_path, {"top_p": 0.3}, count=60, length=1)
    for prompt, drawn in zip(PROMPTS, texts, strict=True):
        every = probabilities(words, prompt.prompt, 1)
        ordered = sorted(every, key=lambda tokens: -every[tokens])
        before = np.cumsum([0.0] + [every[tokens] for tokens in ordered])[:-1]
        kept = {
            said(words.tokenizer, prompt.prompt, [t for t in tokens if t > 1])
            for tokens, p in zip(ordered, before, strict=True)
            if p < 0.3
        }
        assert set(drawn) <= kept


def test_a_function_of_ones_own(words, tmp_path):
    _, texts = run(words, tmp_path / "a", f"{HERE}:echo", count=2)
    assert texts[1].tolist() == ["c a b|5000|3", "c a b|5001|3"]
    with pytest.raises(InputError, match="not one text for each of 3 prompts"):
        run(words, tmp_path / "b", f"{HERE}:too_few")
    with pytest.raises(RewardError, match="must score every response"):
        run(words, tmp_path / "c", {"proxy": f"{HERE}:unscored", "n": 2})


@pytest.mark.parametrize(
    ("description", "message"),
    [
        ({"decoder": {"beam": 1}}, "beam is 1"),
        ({"decoder": {"beam": 4}, "rollouts_per_prompt": 3}, "always returns the same"),
        ({"decoder": {"top_p": 1.0}}, "top_p is 1.0"),
        ({"decoder": {"proxy": "a:b"}}, "is no decoder"),
        ({"decoder": {"proxy": "a:b", "n": True}}, "n is True"),
        ({"decoder": "beam"}, "does not name a function"),
        ({"decoder": 4}, "is no decoder"),
        ({"decoder": "a:b", "rollouts_per_prompt": 0}, "rollouts_per_prompt is 0"),
        ({"decoder": "a:b", "rollouts": 3}, "unknown key rollouts"),
    ],
)
def test_what_is_no_decoder_is_named(description, message):
    with pytest.raises(InputError, match=message):
        MeasuredProcedure.parse({"kind": "fitted", **description})
