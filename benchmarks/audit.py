"""Attack success beyond the attempts made: how often the laws and bounds of `infalign audit` hold the truth.

python benchmarks/audit.py              # simulated prompts of known weakness: about four minutes on one core
python benchmarks/audit.py --model DIR --prompts FILE     # a real model: fitted on 64 attempts, predicted at 512
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from infalign.audit.extrapolate import extrapolate

Rates = Callable[[np.random.Generator, int], np.ndarray]
POPULATIONS: dict[str, Rates] = {
    "Beta(0.3, 30)": lambda rng, count: rng.beta(0.3, 30, count),
    "Beta(0.5, 5)": lambda rng, count: rng.beta(0.5, 5, count),
    "Beta(0.5, 10), 30% immune": lambda rng, count: rng.beta(0.5, 10, count) * (rng.random(count) > 0.3),
    "log-normal": lambda rng, count: np.minimum(1, np.exp(rng.normal(-6, 2, count))),
    "one rate, 0.005": lambda rng, count: np.full(count, 0.005),
}


def simulate(attempts: int, n: int, prompts: int, audits: int) -> None:
    """Coverage of 95 % intervals, mean prediction and mean width over simulated audits."""
    print(f"\n{prompts} prompts, {attempts} attempts, predicted at N = {n}; {audits} audits\n")
    print("| prompts' rates | true ASR | beta-binomial: mean, coverage, width | power law | bounds | without a doubt |")
    print("|---|---|---|---|---|---|")
    for name, draw in POPULATIONS.items():
        rng = np.random.default_rng(0)
        truth = float(np.mean(1 - (1 - draw(rng, 1_000_000)) ** n))
        rates, covered, widths, trusted = [], np.zeros(3), np.zeros(3), 0
        for audit in range(audits):
            counts = rng.binomial(attempts, draw(rng, prompts))
            found = extrapolate(counts, attempts, [n], resamples=100, seed=audit)
            curves = [found.beta_binomial, found.power_law, found.bounds]
            rates.append([np.nan if curve is None else curve.rate[0] for curve in curves])
            covered += [curve is not None and curve.low[0] <= truth <= curve.high[0] for curve in curves]
            widths += [0 if curve is None else curve.high[0] - curve.low[0] for curve in curves]
            trusted += not found.doubts
        mean, covered, widths = np.nanmean(rates, axis=0), covered / audits, widths / audits
        laws = [f"{mean[at]:.3f}, {covered[at]:.0%}, {widths[at]:.2f}" for at in (0, 1)]
        print(f"| {name} | {truth:.3f} | {laws[0]} | {laws[1]} | {covered[2]:.0%}, {widths[2]:.2f} | "
              f"{trusted / audits:.0%} |", flush=True)  # fmt: skip


def hold_out_on(model: str, prompts_file: str, limit: int, rates: list[float]) -> None:
    """Fit on 64 attempts of a real model, predict 512, measure 512; the judge is a threshold on length."""
    from infalign.audit.augment import Augmentation
    from infalign.audit.extrapolate import hold_out
    from infalign.audit.run import AuditSettings, Judge, audit
    from infalign.audit.targets import LocalModel
    from infalign.rewards.source import FunctionReward
    from infalign.rollouts.prompts import load_prompts
    from infalign.rollouts.store import RolloutStore

    prompts = load_prompts(prompts_file, limit=limit).prompts
    source = FunctionReward(lambda prompts, completions: [float(len(text)) for text in completions], key="length")
    with tempfile.TemporaryDirectory() as folder:
        settings = AuditSettings(attempts=512, augmentation=Augmentation(()), max_new_tokens=24)
        audit([LocalModel("model", model)], prompts, Judge(source, 0.0), out=Path(folder), settings=settings)
        store = RolloutStore.read(Path(folder) / "rollouts" / "model" / "attack")
        scores_PM = store.rewards_PK("length", [prompt.id for prompt in prompts], 512)
    print(f"\n{len(prompts)} prompts, a real model; success = a response shorter than a threshold\n")
    print("| single-attempt rate | measured ASR@512 | beta-binomial from 64 | power law from 64 | doubts |")
    print("|---|---|---|---|---|")
    for rate in rates:
        success_PM = scores_PM < np.quantile(scores_PM, rate)
        check = hold_out(success_PM, 64)
        first = extrapolate(success_PM[:, :64].sum(axis=1), 64, [512])
        laws = ["none" if law is None else f"{law[0]:.3f} ({law[1]:.3f} to {law[2]:.3f})"
                for law in (check.beta_binomial, check.power_law)]  # fmt: skip
        print(f"| {success_PM.mean():.4f} | {check.measured:.3f} | {laws[0]} | {laws[1]} | {len(first.doubts)} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--model")
    parser.add_argument("--prompts")
    parser.add_argument("--limit", type=int, default=150)
    parser.add_argument("--audits", type=int, default=100)
    given = parser.parse_args()
    if given.model is None:
        for prompts in (100, 300):
            simulate(64, 512, prompts, given.audits)
    else:
        hold_out_on(given.model, given.prompts, given.limit, [0.05, 0.01, 0.003, 0.001])
