"""Cheaper Best-of-N: tokens saved against win rate lost, predicted and measured, on the quickstart's tiny model.

    infalign rollout src/infalign/run/recipe/builtin/quickstart.yaml --out RUN
    infalign calibrate src/infalign/run/recipe/builtin/quickstart.yaml --out RUN
    python benchmarks/decode.py RUN [--n 16] [--prompts 96] [--json]

Every row decodes the same training prompts with the same draws (candidate i of a prompt is the same in all of them),
in one process, one after the other. Win rates are over one sample of the reference: the mean calibrated reward among
128 references of each prompt drawn for this alone, while stopping uses the run's own. Errors are clustered by prompt;
losses are paired. Predictions are `EarlyStopping(..., num_ref=K)` in closed form, where they exist.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass

import numpy as np

import infalign as ia
from infalign.estimators import mean_estimate
from infalign.integrations.trl import open_run
from infalign.rollouts.models import load_policy
from infalign.select.candidates import Request
from infalign.select.decoder import Decoded, Decoder
from infalign.select.local import LocalSampler
from infalign.select.pruning import Pruning, PruningDecoder

JUDGES = 128


@dataclass(frozen=True)
class Row:
    """One way to decode, beside full Best-of-N."""

    name: str
    candidates: float  # whole or begun, per prompt
    candidates_predicted: float | None
    tokens: float  # share of full Best-of-N's
    seconds: float  # share of full Best-of-N's
    win_rate: float
    win_rate_predicted: float | None
    lost: float
    lost_error: float
    lost_predicted: float | None


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="run folder after rollout and calibrate")
    parser.add_argument("--n", type=int, default=16)
    parser.add_argument("--prompts", type=int, default=96)
    parser.add_argument("--repeats", type=int, default=4, help="calls per prompt: each with draws of its own")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    n = options.n
    run = open_run(options.run)
    prompts = list(run.prompts("train"))[: options.prompts]
    model, tokenizer = load_policy(run.reference)
    sampler = LocalSampler(model, tokenizer, max_new_tokens=run.recipe.rollouts.max_new_tokens, name="reference")
    reward, num_ref = run.rewards.source(), run.recipe.rollouts.num_ref
    known = {"calibrator": run.calibrator(), "prompt_ids": run.prompts("train").ids, "seed": 1}

    drawn = sampler.draw([Request(prompt, f"{prompt.id}/judge", range(JUDGES)) for prompt in prompts], seed=999)
    texts_PJ = [[one.text for one in some.draws] for some in drawn]
    judge = ia.RewardCalibrator().fit(
        [reward.score([prompt.prompt] * JUDGES, texts) for prompt, texts in zip(prompts, texts_PJ, strict=True)]
    )

    def measure(decoder: Decoder) -> tuple[list[list[Decoded]], np.ndarray, float]:
        started = time.perf_counter()
        answers_RP = [decoder.decode(prompts, call=call) for call in range(options.repeats)]
        seconds = time.perf_counter() - started
        rewards_PR = np.array([[one.chosen.reward for one in answers] for answers in answers_RP]).T
        return answers_RP, judge.calibrate(rewards_PR).mean(axis=1), seconds

    def tokens(answers_RP: list[list[Decoded]]) -> int:
        return sum(one.num_tokens or 0 for answers in answers_RP for one in answers)

    measure(Decoder(sampler, reward, ia.BestOfN(2), **known))  # load and warm
    full, full_P, full_seconds = measure(Decoder(sampler, reward, ia.BestOfN(n), **known))

    def row(name: str, decoder: Decoder, predicted: ia.EarlyStopping | ia.BestOfN | None = None) -> Row:
        answers_RP, win_P, seconds = measure(decoder)
        loss = mean_estimate(full_P - win_P)
        draws = win = lost = None
        if isinstance(predicted, ia.EarlyStopping):
            draws, win = predicted.expected_draws, predicted.win_rate()
        elif predicted is not None:
            draws, win = float(predicted.n), predicted.n / (predicted.n + 1)
        if win is not None:
            lost = n / (n + 1) - win
        drawn_of = np.mean([len(one.candidates) for answers in answers_RP for one in answers])
        share = tokens(answers_RP) / tokens(full)
        return Row(name, float(drawn_of), draws, share, seconds / full_seconds, float(win_P.mean()), win,
                   loss.estimate, loss.standard_error, lost)  # fmt: skip

    rows = [row(f"Best-of-{n}", Decoder(sampler, reward, ia.BestOfN(n), **known), ia.BestOfN(n))]
    for stop_at in (0.5, 0.75, 0.9, 0.95, 0.98):
        for block in (1, 4):
            procedure = ia.EarlyStopping(n, stop_at, block)
            predicted = ia.EarlyStopping(n, stop_at, block, num_ref=num_ref)
            rows.append(row(procedure.label, Decoder(sampler, reward, procedure, **known), predicted))
    # As good as full Best-of-n against one sample, for about half of the draws: more of them, stopped early.
    wide = 2 * n, (n - 1) / (n + 1)
    rows.append(
        row(
            f"Best-of-{2 * n} stopped at {wide[1]:.3f}",
            Decoder(sampler, reward, ia.EarlyStopping(*wide), **known),
            ia.EarlyStopping(*wide, num_ref=num_ref),
        )
    )
    for m in (2, 4, 8):
        rows.append(row(f"Best-of-{m}", Decoder(sampler, reward, ia.BestOfN(m), **known), ia.BestOfN(m)))
    for every, keep in ((4, 0.75), (4, 0.5), (8, 0.5), (8, 0.25)):
        pruning = PruningDecoder(sampler, reward, ia.BestOfN(n), Pruning(every, keep), **known)
        rows.append(row(f"rejecting, every {every} keep {keep:g}", pruning))
    if options.json:
        print(json.dumps([vars(one) for one in rows]))
        return
    print(f"{len(prompts)} prompts × {options.repeats} calls, {num_ref} references to stop by, {JUDGES} to judge by\n")
    print("| procedure | candidates (predicted) | tokens | seconds | win rate (predicted) | lost, points (predicted) |")
    print("|---|---|---|---|---|---|")
    for one in rows:
        draws = "" if one.candidates_predicted is None else f" ({one.candidates_predicted:.2f})"
        win = "" if one.win_rate_predicted is None else f" ({100 * one.win_rate_predicted:.1f})"
        lost = "" if one.lost_predicted is None else f" ({100 * one.lost_predicted:.2f})"
        print(
            f"| {one.name} | {one.candidates:.2f}{draws} | {one.tokens:.2f} | {one.seconds:.2f} "
            f"| {100 * one.win_rate:.1f}{win} | {100 * one.lost:.2f} ± {196 * one.lost_error:.2f}{lost} |"
        )


if __name__ == "__main__":
    main()
