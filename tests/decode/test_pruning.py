"""Rejecting candidates part-way: what is kept is what Best-of-N would have drawn, and what is lost is measured."""

from __future__ import annotations

import numpy as np
import pytest

import infalign as ia
from infalign._io.http import Endpoint
from infalign.errors import InputError, RewardError
from infalign.rewards.source import FunctionReward
from infalign.select.candidates import Request
from infalign.select.decoder import Decoder
from infalign.select.local import Beginning
from infalign.select.pruning import REJECTED, Pruning, PruningDecoder
from infalign.select.remote import EndpointSampler

LENGTH = 12


def early_letters(prompts, completions):
    """High where letters from the beginning of the alphabet are, on average: a beginning foretells the whole."""
    values = [[ord("m") - ord(word[0]) for word in text.split()] for text in completions]
    return [float(np.mean(some)) if some else 0.0 for some in values]


REWARD = FunctionReward(early_letters, key="early")


def decoders(enumerated, pruning, n=8):
    sampler = enumerated.sampler(max_new_tokens=LENGTH)
    return Decoder(sampler, REWARD, ia.BestOfN(n), seed=4), PruningDecoder(
        sampler, REWARD, ia.BestOfN(n), pruning, seed=4
    )


def test_a_candidate_drawn_in_stages_is_the_candidate_drawn_at_once(enumerated):
    sampler = enumerated.sampler(max_new_tokens=LENGTH, batch_size=5)
    (whole,) = sampler.draw([Request(enumerated.prompt, "s", range(16))], seed=7)
    going, done = [Beginning(enumerated.prompt, "s", index) for index in range(16)], {}
    while going:
        longer = sampler.extend(going, 5, seed=7)
        done |= {one.index: one for one in longer if one.finish_reason}
        going = [one for one in longer if not one.finish_reason]
    assert [(sampler.text(one), len(one.token_ids), one.finish_reason) for _, one in sorted(done.items())] == [
        (one.text, one.num_tokens, one.finish_reason) for one in whole.draws
    ]


def test_keeping_all_is_best_of_n(enumerated):
    whole, pruned = decoders(enumerated, Pruning(every=3, keep=1.0))
    prompts = [enumerated.prompt, "c d", enumerated.prompt]
    for full, staged in zip(whole.decode(prompts), pruned.decode(prompts), strict=True):
        assert sorted(one.text for one in full.candidates) == sorted(one.text for one in staged.candidates)
        assert full.chosen.reward == staged.chosen.reward
        assert full.num_tokens == staged.num_tokens


def test_rejected_candidates_are_beginnings_and_never_chosen(enumerated):
    whole, pruned = decoders(enumerated, Pruning(every=3, keep=0.5))
    prompts = [enumerated.prompt] * 150
    full, staged = whole.decode(prompts), pruned.decode(prompts)
    for all_of, some_of in zip(full, staged, strict=True):
        assert len(some_of.candidates) == 8
        texts = [one.text for one in all_of.candidates]
        for one in some_of.candidates:
            if one.finish_reason == REJECTED:
                assert one.num_tokens in (3, 6, 9)
                assert any(text.startswith(one.text) for text in texts)
                assert [one.reward] == early_letters([""], [one.text])
            else:
                assert one.text in texts
        assert some_of.chosen.finish_reason != REJECTED
        assert some_of.chosen.reward == max(o.reward for o in some_of.candidates if o.finish_reason != REJECTED)
        assert some_of.chosen.reward <= all_of.chosen.reward
        assert some_of.num_tokens == sum(one.num_tokens for one in some_of.candidates) <= all_of.num_tokens
    saved = 1 - sum(one.num_tokens for one in staged) / sum(one.num_tokens for one in full)
    assert saved > 0.15
    # It still finds better answers than as many tokens spent on whole candidates: here four of them.
    four = np.mean([max(one.reward for one in answer.candidates[:4]) for answer in full])
    assert four < np.mean([answer.chosen.reward for answer in staged])


def test_refusals(enumerated):
    sampler = enumerated.sampler(max_new_tokens=LENGTH)
    with pytest.raises(InputError, match="only Best-of-N"):
        PruningDecoder(sampler, REWARD, ia.WorstOfN(4), Pruning(3))
    remote = EndpointSampler(Endpoint("http://127.0.0.1:9/v1"), "toy", max_new_tokens=4)
    with pytest.raises(InputError, match="in this process"):
        PruningDecoder(remote, REWARD, ia.BestOfN(4), Pruning(3))
    with pytest.raises(InputError, match="stop_reward"):
        PruningDecoder(sampler, REWARD, ia.BestOfN(4), Pruning(3), stop_reward=1.0)
    for keep in (0.0, 1.5, float("nan")):
        with pytest.raises(InputError, match="keep"):
            Pruning(3, keep)

    def only_whole(prompts, completions):
        return [None if p == "c" else 1.0 for p in prompts]

    decoder = PruningDecoder(sampler, FunctionReward(only_whole, key="whole"), ia.BestOfN(4), Pruning(3))
    good, bad, long = decoder.decode_each(["b", "c", "a " * 60])
    assert good.chosen.reward == 1.0
    assert isinstance(bad, RewardError)
    assert "beginnings" in str(bad)
    assert isinstance(long, InputError)
