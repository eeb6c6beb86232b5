"""Procedures as samplers: what comes out has the CDF H(F), and whatever cannot be ranked is said, not guessed."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from scipy import stats

import infalign as ia
from infalign.calibration.calibrator import RewardCalibrator
from infalign.errors import InputError, RewardError
from infalign.procedures import InferenceProcedure
from infalign.rewards.source import FunctionReward
from infalign.rollouts.prompts import Prompt
from infalign.select.decoder import Decoder
from tests.training.enumerable import hashed_reward

FALSE_ALARM = 1e-4  # of each Kolmogorov-Smirnov test


def coarse(prompts, completions):
    """Three values only: ties everywhere."""
    return [round(2 * value) / 2 for value in hashed_reward(prompts, completions)]


def rewards_of(answers):
    return np.array([answer.chosen.reward for answer in answers])


DISTINCT = [
    ia.Standard(),
    *(ia.BestOfN(n) for n in (1, 2, 4, 16)),
    *(ia.WorstOfN(n) for n in (2, 16)),
    ia.OrderStatistic(k=2, n=4),
    ia.Mixture([(0.6, ia.Standard()), (0.4, ia.BestOfN(8))]),
]


@pytest.mark.parametrize(
    ("procedure", "ties"),
    [(procedure, False) for procedure in DISTINCT] + [(ia.BestOfN(4), True), (ia.WorstOfN(2), True)],
    ids=lambda value: getattr(value, "label", "ties" if value else "distinct"),
)
def test_what_comes_out_has_the_cdf_of_the_theory(enumerated, procedure, ties):
    """KS on exact ranks; 11 tests, so a false alarm once in about 900 choices of the seed."""
    reward = FunctionReward(coarse if ties else hashed_reward, key="r")
    answers = Decoder(enumerated.sampler(), reward, procedure, seed=11).decode([enumerated.prompt] * 1500)
    scale = enumerated
    if ties:
        scale = type(enumerated)(**{**vars(enumerated), "rewards": np.round(2 * enumerated.rewards) / 2})
    uniform = scale.uniform_under(procedure.distortion, rewards_of(answers), np.random.default_rng(0))
    assert stats.kstest(uniform, "uniform").pvalue > FALSE_ALARM
    # The test can fail: against the CDF of one candidate more it does, wherever that differs enough to be seen.
    if isinstance(procedure, ia.BestOfN) and procedure.n <= 4:
        wrong = scale.uniform_under(
            ia.BestOfN(procedure.n + 1).distortion, rewards_of(answers), np.random.default_rng(0)
        )
        assert stats.kstest(wrong, "uniform").pvalue < FALSE_ALARM


def test_the_answer_is_one_of_the_candidates_and_costs_are_counted(enumerated):
    decoder = Decoder(enumerated.sampler(), enumerated.reward(), ia.BestOfN(4), seed=1)
    seen = []
    for answer in decoder.decode([enumerated.prompt, "c d a"], lambda *said: seen.append(said)):
        assert len(answer.candidates) == 4
        assert answer.chosen in answer.candidates
        assert answer.chosen.reward == max(one.reward for one in answer.candidates)
        expected = hashed_reward([answer.prompt.prompt] * 4, [one.text for one in answer.candidates])
        assert [one.reward for one in answer.candidates] == expected
        assert answer.num_tokens == sum(one.num_tokens for one in answer.candidates)
        assert all(one.num_tokens in (1, 2) and one.finish_reason in ("stop", "length") for one in answer.candidates)
        assert answer.seconds > 0
        assert answer.procedure == ia.BestOfN(4)
        assert all(one.calibrated_reward is None for one in answer.candidates)
    assert seen == [(0, 2, ""), (2, 2, "")]


def texts(answers):
    return [[one.text for one in answer.candidates] for answer in answers]


def test_calls_draw_afresh_and_numbered_calls_repeat(enumerated):
    one, again = (Decoder(enumerated.sampler(), enumerated.reward(), ia.BestOfN(8), seed=5) for _ in range(2))
    prompts = [enumerated.prompt, Prompt("c d a"), enumerated.prompt]
    first, second = one.decode(prompts), one.decode(prompts)
    assert texts(first) != texts(second)
    assert texts(first)[0] != texts(first)[2], "a prompt that comes twice gets its own candidates"
    assert texts(again.decode(prompts)) == texts(first)
    # A numbered call depends on nothing but its prompt: not on its company, nor on what was decoded before.
    alone = one.decode([Prompt("c d a")], call=0)
    assert texts(alone) == texts(first)[1:2]
    assert alone[0].chosen == first[1].chosen
    other = Decoder(enumerated.sampler(batch_size=3), enumerated.reward(), ia.BestOfN(8), seed=6)
    assert texts(other.decode(prompts)) != texts(first)
    small = Decoder(enumerated.sampler(batch_size=3), enumerated.reward(), ia.BestOfN(8), seed=5)
    assert texts(small.decode(prompts)) == texts(first)


def test_threads_do_not_disturb_each_other(enumerated):
    decoder = Decoder(enumerated.sampler(), enumerated.reward(), ia.BestOfN(4), seed=5)
    alone = {call: texts(decoder.decode([enumerated.prompt], call=call)) for call in range(12)}
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda call: texts(decoder.decode([enumerated.prompt], call=call)), range(12)))
    assert together == [alone[call] for call in range(12)]


def test_ties_are_broken_at_random(enumerated):
    constant = FunctionReward(lambda prompts, completions: [0.0] * len(prompts), key="constant")
    answers = Decoder(enumerated.sampler(), constant, ia.BestOfN(4), seed=3).decode([enumerated.prompt] * 800)
    place = Counter(next(i for i, one in enumerate(a.candidates) if one is a.chosen) for a in answers)
    assert stats.chisquare([place[i] for i in range(4)]).pvalue > FALSE_ALARM


def test_a_mixture_draws_its_part_for_every_prompt(enumerated):
    mixture = ia.Mixture([(0.75, ia.Standard()), (0.25, ia.BestOfN(3))])
    answers = Decoder(enumerated.sampler(), enumerated.reward(), mixture, seed=3).decode([enumerated.prompt] * 800)
    drawn = Counter(len(answer.candidates) for answer in answers)
    assert all(len(answer.candidates) == answer.procedure.n for answer in answers)
    assert stats.binomtest(drawn[3], 800, 0.25).pvalue > FALSE_ALARM


def test_calibrated_rewards_are_those_of_the_calibrator(enumerated):
    calibrator = RewardCalibrator().fit(np.random.default_rng(0).random((1, 64)))
    decoder = Decoder(
        enumerated.sampler(),
        enumerated.reward(),
        ia.BestOfN(4),
        calibrator=calibrator,
        prompt_ids=[enumerated.prompt.id],
    )
    known, unknown = decoder.decode([enumerated.prompt, "c d"])
    rewards = np.array([[one.reward for one in known.candidates]])
    assert [[one.calibrated_reward for one in known.candidates]] == calibrator.calibrate(rewards).tolist()
    assert [one.calibrated_reward for one in unknown.candidates] == [None] * 4


# --- what cannot be ranked ---


def picky(prompts, completions):
    """No reward for any response to the second prompt that begins with an a; an error for the third prompt."""
    if any(prompt == "d" for prompt in prompts):
        raise ValueError("no d, please")
    return [None if p == "c" and "a" in c else 1.0 * len(c) for p, c in zip(prompts, completions, strict=True)]


def test_an_unscored_candidate_fails_its_prompt_and_no_other(enumerated):
    decoder = Decoder(enumerated.sampler(), FunctionReward(picky, key="picky"), ia.BestOfN(16), seed=2)
    good, unscored, raised = decoder.decode_each(["b", "c", "d"])
    assert good.chosen.reward == max(one.reward for one in good.candidates)
    assert isinstance(unscored, RewardError)
    assert "of 16 candidates" in str(unscored)
    assert "it returned no reward" in str(unscored)
    assert isinstance(raised, RewardError)
    assert "16 of 16" in str(raised)
    assert "no d, please" in str(raised)
    with pytest.raises(RewardError, match="it returned no reward"):
        decoder.decode(["b", "c", "d"], call=0)


def test_a_reward_that_is_no_number_fails_its_prompt_and_no_other(enumerated):
    def nan_for_c(prompts, completions):
        return [float("nan") if prompt == "c" else 0.5 for prompt in prompts]

    decoder = Decoder(enumerated.sampler(), FunctionReward(nan_for_c, key="nan"), ia.BestOfN(2))
    good, bad = decoder.decode_each(["b", "c"])
    assert good.chosen.reward == 0.5
    assert isinstance(bad, RewardError)
    assert "nan" in str(bad)


def test_standard_sampling_needs_no_reward(enumerated):
    (answer,) = Decoder(enumerated.sampler(), None, ia.Standard()).decode([enumerated.prompt])
    assert answer.chosen.reward is None
    reward = FunctionReward(picky, key="picky")
    (answer,) = Decoder(enumerated.sampler(), reward, ia.Standard()).decode(["d"])
    assert answer.chosen.reward is None
    assert "no d, please" in answer.chosen.error


def test_a_prompt_that_does_not_fit_fails_alone(enumerated):
    decoder = Decoder(enumerated.sampler(), enumerated.reward(), ia.BestOfN(2))
    good, long, empty = decoder.decode_each(["b", "a " * 70, ""])
    assert len(good.candidates) == 2
    assert isinstance(long, InputError)
    assert "no room" in str(long)
    assert isinstance(empty, InputError)


class Unknown(InferenceProcedure):
    """Says neither n nor how it chooses."""

    def distortion(self, q):
        return np.asarray(q)

    def density(self, q):
        return np.ones_like(q)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"procedure": Unknown()}, "how many candidates"),
        ({"procedure": ia.FittedProcedure((0.5, 0.5), 50)}, "how many candidates"),
        ({"procedure": ia.Mixture([(0.5, ia.BestOfN(2)), (0.5, Unknown())])}, "how many candidates"),
        ({"procedure": "best-of-4"}, "not a procedure"),
        ({"reward": None}, "needs a reward"),
        ({"procedure": ia.EarlyStopping(4, 0.9)}, "no calibration"),
        ({"procedure": ia.WorstOfN(4), "stop_reward": 1.0}, "stop_reward is for Best-of-N"),
        ({"stop_reward": np.nan}, "stop_reward"),
        ({"block": 0}, "whole number"),
        ({"prompt_ids": ["a"]}, "goes with"),
        ({"calibrator": RewardCalibrator().fit([[0.0, 1.0]]), "prompt_ids": ["a", "b"]}, "2 prompt ids"),
    ],
)
def test_what_cannot_be_decoded_is_refused_before_anything_is_drawn(enumerated, settings, message):
    settings = {"reward": enumerated.reward(), "procedure": ia.BestOfN(4), **settings}
    with pytest.raises(InputError, match=message):
        Decoder(enumerated.sampler(), **settings)
