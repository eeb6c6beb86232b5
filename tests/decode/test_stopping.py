"""Early stopping as it is run: the predicted distribution, the predicted saving, and the rule that loses nothing."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from scipy import stats

import infalign as ia
from infalign.calibration.calibrator import RewardCalibrator
from infalign.calibration.combined import CombinedCalibrator
from infalign.errors import InputError
from infalign.rewards.combined import CombinedReward
from infalign.rewards.source import FunctionReward
from infalign.rollouts.prompts import Prompt
from infalign.select.candidates import CandidateSampler, Draw, Drawn
from infalign.select.decoder import Decoder
from tests.decode.test_decoder import FALSE_ALARM, coarse, rewards_of


def costs(answers):
    return np.array([len(answer.candidates) for answer in answers])


@pytest.mark.parametrize("procedure", [ia.EarlyStopping(8, 0.75), ia.EarlyStopping(7, 0.9, block=3)],
                         ids=lambda procedure: procedure.label)  # fmt: skip
def test_on_a_model_it_has_the_predicted_distribution_and_cost(enumerated, procedure):
    """One calibrator, so the threshold is one known reward: its exact quantile makes the prediction exact."""
    rng = np.random.default_rng(4)
    references = rng.choice(enumerated.rewards, (1, 200), p=enumerated.chances / enumerated.chances.sum())
    calibrator = RewardCalibrator().fit(references)
    decoder = Decoder(enumerated.sampler(), enumerated.reward(), procedure, calibrator=calibrator,
                      prompt_ids=[enumerated.prompt.id], seed=8)  # fmt: skip
    answers = decoder.decode([enumerated.prompt] * 1500)
    values = np.unique(enumerated.rewards)
    accepted = values[calibrator.calibrate(values[None])[0] >= procedure.stop_at]
    exact = ia.EarlyStopping(procedure.n, float(enumerated.below(accepted[0])[0]), procedure.block)
    uniform = enumerated.uniform_under(exact.distortion, rewards_of(answers), rng)
    assert stats.kstest(uniform, "uniform").pvalue > FALSE_ALARM
    assert stats.ttest_1samp(costs(answers), exact.expected_draws).pvalue > FALSE_ALARM
    assert exact.expected_draws < 0.85 * procedure.n
    for answer in answers:
        quantiles = np.array([one.calibrated_reward for one in answer.candidates])
        last = (len(quantiles) - 1) // procedure.block * procedure.block
        assert (quantiles[:last] < procedure.stop_at).all(), "it went on only while none was good enough"
        assert (quantiles[last:] >= procedure.stop_at).any() or len(quantiles) == procedure.n
        assert answer.chosen.reward == max(one.reward for one in answer.candidates)


class Numbers(CandidateSampler):
    """Says uniform numbers."""

    name = "numbers"

    def draw(self, requests, seed):
        drawn = []
        for request in requests:
            stream = [int.from_bytes(request.stream.encode(), "big"), seed]
            values = [np.random.default_rng([*stream, index]).random() for index in request.indices]
            drawn.append(Drawn(tuple(Draw(repr(value), 1, "stop") for value in values), len(values)))
        return drawn


def said(prompts, completions):
    return [float(text) for text in completions]


def test_with_few_references_the_prediction_counts_where_the_threshold_may_lie():
    """Every prompt with references of its own: the distribution over prompts is that with `num_ref`, not without."""
    num_prompts, num_ref = 3000, 12
    prompts = [Prompt(f"{i}") for i in range(num_prompts)]
    calibrator = RewardCalibrator().fit(np.random.default_rng(0).random((num_prompts, num_ref)))
    decoder = Decoder(Numbers(), FunctionReward(said, key="said"), ia.EarlyStopping(8, 0.9), calibrator=calibrator,
                      prompt_ids=[prompt.id for prompt in prompts])  # fmt: skip
    answers = decoder.decode(prompts)
    predicted = ia.EarlyStopping(8, 0.9, num_ref=num_ref)
    assert stats.kstest(predicted.distortion(rewards_of(answers)), "uniform").pvalue > FALSE_ALARM
    assert stats.ttest_1samp(costs(answers), predicted.expected_draws).pvalue > FALSE_ALARM
    assert stats.kstest(ia.EarlyStopping(8, 0.9).distortion(rewards_of(answers)), "uniform").pvalue < FALSE_ALARM


def test_stopping_at_the_greatest_reward_loses_nothing(enumerated):
    """Three grades: the answers are those of Best-of-6 in distribution, grade for grade and text for text."""
    reward, top = FunctionReward(coarse, key="coarse"), 1.0
    scale = type(enumerated)(**{**vars(enumerated), "rewards": np.round(2 * enumerated.rewards) / 2})
    decoder = Decoder(enumerated.sampler(), reward, ia.BestOfN(6), stop_reward=top, block=2, seed=2)
    answers = decoder.decode([enumerated.prompt] * 2000)
    uniform = scale.uniform_under(ia.BestOfN(6).distortion, rewards_of(answers), np.random.default_rng(0))
    assert stats.kstest(uniform, "uniform").pvalue > FALSE_ALARM
    predicted = ia.EarlyStopping(6, float(scale.below(top)[0]), block=2).expected_draws
    assert stats.ttest_1samp(costs(answers), predicted).pvalue > FALSE_ALARM
    whole = Decoder(enumerated.sampler(), reward, ia.BestOfN(6), seed=3).decode([enumerated.prompt] * 2000)
    counts = [Counter(one.chosen.text for one in some) for some in (answers, whole)]
    common = [text for text, count in (counts[0] + counts[1]).items() if count >= 20]
    table = [[count[text] for text in common] for count in counts]
    assert stats.chi2_contingency(table).pvalue > FALSE_ALARM


def test_a_prompt_without_references_fails_alone(enumerated):
    calibrator = RewardCalibrator().fit([[0.2, 0.5, 0.8]])
    decoder = Decoder(enumerated.sampler(), enumerated.reward(), ia.EarlyStopping(4, 0.6), calibrator=calibrator,
                      prompt_ids=[enumerated.prompt.id])  # fmt: skip
    known, unknown = decoder.decode_each([enumerated.prompt, "c"])
    assert known.chosen.text is not None
    assert isinstance(unknown, InputError)
    assert "no reference rewards" in str(unknown)


def test_several_rewards_choose_by_their_combined_quantiles(enumerated):
    def length(prompts, completions):
        return [float(len(text)) for text in completions]

    sources = [enumerated.reward(), FunctionReward(length, key="length")]
    references = np.stack([np.random.default_rng(0).random((1, 32)), np.full((1, 32), 2.0)], axis=-1)
    calibrator = CombinedCalibrator([2, 1]).fit(references)
    decoder = Decoder(enumerated.sampler(), CombinedReward(sources, [2, 1]), ia.BestOfN(5), calibrator=calibrator,
                      prompt_ids=[enumerated.prompt.id])  # fmt: skip
    known, unknown = decoder.decode_each([enumerated.prompt, "c"])
    texts = [one.text for one in known.candidates]
    asked = np.stack([source.score([enumerated.prompt.prompt] * 5, texts) for source in sources], axis=-1)[None]
    assert [one.reward for one in known.candidates] == calibrator.score(asked)[0].tolist()
    assert [one.calibrated_reward for one in known.candidates] == calibrator.calibrate(asked)[0].tolist()
    assert known.chosen.reward == max(one.reward for one in known.candidates)
    assert isinstance(unknown, InputError)
