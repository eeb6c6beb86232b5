"""Made-up results of two methods, with hostile text in every place that a model or a user can fill."""

import dataclasses
import functools

import numpy as np

from infalign.evaluation.measure import measure
from infalign.procedures import BestOfN, Standard, WorstOfN
from infalign.report.page import ReportData

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
