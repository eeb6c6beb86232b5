"""Made-up results of two methods, with hostile text in every place that a model or a user can fill."""

import dataclasses
import functools

import numpy as np

from infalign.evaluation.measure import measure
from infalign.evaluation.reshaped import ReshapedRecord
from infalign.procedures import BestOfN, Standard, WorstOfN
from infalign.report.page import ReportData
from infalign.reshape import Predicted, Predictions, Reshaping, ReshapingData
from infalign.reshape.histogram import log_ratio_histogram

HOSTILE = (
    "</script><img src=x onerror=\"document.title='pwned'\"><b>bold</b> &amp; {{ 7*7 }} \u202eright to left\u202c 🎉"
)
LONG_LINE = "x" * 100_000
PROCEDURES = [Standard(), BestOfN(2), BestOfN(4), WorstOfN(2), WorstOfN(4)]


def method(label, shift, *, num_prompts=60, **options):
    rng = np.random.default_rng(0)
    ref_rewards_PK, rewards_PG = rng.normal(size=(num_prompts, 8)), shift + rng.normal(size=(num_prompts, 8))
    log_ratios_PG = shift * rewards_PG - shift**2 / 2
    gold = {"gold": (rewards_PG - shift, ref_rewards_PK)}
    return measure(label, rewards_PG, ref_rewards_PK, log_ratios_PG, PROCEDURES, judges=gold, **options)


@functools.cache
def two_methods():
    aware = dataclasses.replace(method("aware", 0.8), kl=method("plain", 0.5).kl)
    return aware, method("plain", 0.5)


def sweep():
    """Three checkpoints of one training, and another method."""
    steps = [dataclasses.replace(method(f"a step {s}", s / 40), series="a", step=s) for s in (10, 20, 40)]
    return [*steps, method("b", 0.4)]


def predicted(estimate, error):
    return Predicted(estimate, error, (estimate - 2 * error, estimate + 2 * error))


def fitted(shape, acceptance, tokens, **about):
    """What `reshape.json` holds of a fit for Best-of-4, with made-up numbers."""
    rates = {"Standard": predicted(0.61, 0.02), "Best-of-4": predicted(0.79, 0.015)}
    predictions = Predictions(
        predicted(0.31, 0.02), rates, predicted(acceptance, 0.02), predicted(1 / acceptance, 0.1),
        predicted(tokens, 0.5), 90.0, True,
    )  # fmt: skip
    rng = np.random.default_rng(2)
    ratios_PK = rng.normal(-0.5, 1.0, size=(20, 32))
    data = ReshapingData.from_rewards(
        *(ratios_PK, ratios_PK),
        aligned_log_ratios_PG=(own := ratios_PK + 1.0),
        aligned_rewards_PG=own,
    )
    made = dataclasses.replace(shape, procedure="Best-of-4", beta=0.2, predictions=predictions)
    return {
        "reshaping": made.to_dict(),
        "plain": {"kl": predicted(2.4, 0.1).to_dict(), "win_rate": predicted(0.8, 0.02).to_dict()},
        "chosen": True,
        **about,
        "reason": "made up",
        "prompts": 20,
        "histogram": log_ratio_histogram(data),
    }


MIXTURE = fitted(Reshaping.mixture(0.125), 1.0, 12.0, method="own", trained_weight=0.25)
RESHAPED = fitted(Reshaping.table([-3.0, 0.0, 3.0], [-2.0, 0.0, 0.5]), 0.4, 30.0, method="plain", trained_weight=None)


def reshaped_methods():
    """A mixture, then a comparator reshaped and plain, at nearly the same KL."""
    own = ReshapedRecord.of_fit(MIXTURE, tokens=12.5)
    other = ReshapedRecord.of_fit(RESHAPED, acceptance=0.42, tokens=29.0)
    # Best-of-4 wins by a few excellent samples among ordinary ones, and so a single sample wins less.
    rng = np.random.default_rng(5)
    ref_rewards_PK = rng.normal(size=(60, 8))
    rewards_PG = rng.normal(size=(60, 8)) + 1.5 * (rng.random((60, 8)) < 0.2)
    mixed = measure("own-mixture", rewards_PG, ref_rewards_PK, rewards_PG, PROCEDURES)
    plain = method("plain", 0.8)
    kl = dataclasses.replace(plain.kl)
    return [
        dataclasses.replace(mixed, kl=kl, reshaped=own, reward=plain.reward),
        dataclasses.replace(method("plain-reshaped", 0.9), kl=kl, reshaped=other),
        plain,
    ]


def candidate(text, reward, *, chosen):
    return {
        "text": text,
        "reward": reward,
        "calibrated_reward": 1 / (1 + np.exp(-reward)),
        "finish_reason": "stop",
        "chosen": chosen,
    }


def report_data(**changes):
    aware, plain = two_methods()
    samples = [
        {
            "prompt": f"prompt number {i}",
            "methods": {
                "reference": {"candidates": [candidate(f"reference {i}", 0.0, chosen=True)]},
                "aware": {
                    "candidates": [
                        candidate(f"needle {i}", 1.0 if i % 3 else -1.0, chosen=True),
                        candidate("second best", -2.0, chosen=False),
                    ]
                },
                "plain": {"candidates": [candidate(f"plain {i}", 0.0, chosen=True)]},
            },
        }
        for i in range(30)
    ]
    samples[0]["prompt"] = [{"role": "user", "content": HOSTILE}]
    samples[0]["methods"]["aware"]["candidates"][0]["text"] = HOSTILE
    samples[1]["methods"]["aware"]["candidates"][0]["text"] = LONG_LINE
    rng = np.random.default_rng(1)
    fields = {
        "results": [aware, plain],
        "procedure": "Best-of-4",
        "title": f"Title {HOSTILE}",
        "baseline": "plain",
        "plan": {"best": {"kl": 0.15, "beta": 0.4}},
        "settings": {"policy": {"path": HOSTILE}, "seed": 0},
        "versions": {"infalign": "0.1.0"},
        "samples": samples,
        "curves": {
            "aware": [{"step": s, "kl": 0.01 * s, "calibrated_reward": 0.5, "beta": 0.3} for s in range(100)],
            "plain": [{"step": s, "kl": 0.01 * s} for s in range(10)],
        },
        "rewards": {
            label: {"rewards": rng.normal(size=50).tolist(), "calibrated_rewards": rng.uniform(size=50).tolist()}
            for label in ("reference", "aware", "plain")
        },
    }
    return ReportData(**{**fields, **changes})
