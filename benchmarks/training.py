"""How many sampled tokens online training needs, with each baseline; and what our step costs beside plain RLOO.

    python benchmarks/training.py tokens           # on a policy small enough to enumerate: minutes
    python benchmarks/training.py solvers          # the same, beside solvers that also use stored rollouts
    python benchmarks/training.py step             # time per step beside plain RLOOTrainer, interleaved

`tokens` trains to the optimum p·exp(Φ/β)/Z of an enumerable policy with the same number of rollouts per step, split
among more or fewer responses per prompt, and reports how many sampled tokens it took to bring the exact objective
E Φ/β − KL to 95 % of the way from the reference's to the optimum's.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback, set_seed
from trl.trainer.rloo_trainer import RLOOTrainer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.training.enumerable import PROMPTS, TOKENS, Testbed, enumerate_responses, hashed_reward

from infalign.procedures import BestOfN, WorstOfN
from infalign.rewards.score import score_store
from infalign.rewards.source import FunctionReward
from infalign.rollouts.key import RolloutKey
from infalign.rollouts.models import load_policy
from infalign.rollouts.sample import sample
from infalign.rollouts.store import RolloutStore
from infalign.run.testbed.quiet import quiet
from infalign.theory.alternatives import tilt_at_kl
from infalign.theory.plan import optimum_at_kl
from infalign.training import online
from infalign.training.fresh import FreshRollouts
from infalign.training.losses import Regression
from infalign.training.offline import align_offline
from infalign.training.online import ANNEAL
from infalign.training.pool import stored_rollouts
from infalign.training.reward import TransformedReward
from infalign.training.steering import Steering
from infalign.transforms import Exponential, Identity, RewardTransform


class Objective(TrainerCallback):
    """The exact objective E Φ/β − KL after every step, averaged over the prompts."""

    def __init__(self, testbed: Testbed, reward: Any) -> None:
        self.testbed, self.reward = testbed, reward
        self.values: list[float] = []
        self.start = self.of(load_policy(testbed.reference)[0])
        self.best = float(np.mean([self._log_z(index) for index in range(len(PROMPTS))]))

    def _tilt(self, index: int) -> np.ndarray:
        prompt, responses = PROMPTS[index], self.testbed.responses[index]
        return self.reward.tilt(self.testbed.rewards(prompt, responses), [prompt.id] * len(responses))

    def _log_z(self, index: int) -> float:
        return float(np.logaddexp.reduce(np.array(list(self.testbed.responses[index].values())) + self._tilt(index)))

    def of(self, model: Any) -> float:
        """The exact objective of this policy."""
        total = 0.0
        for index, prompt in enumerate(PROMPTS):
            reached = enumerate_responses(model, self.testbed.tokenizer, prompt.prompt)
            before = np.array(list(self.testbed.responses[index].values()))
            now = np.array([reached[response] for response in self.testbed.responses[index]])
            total += float((np.exp(now) * (self._tilt(index) - now + before)).sum())
        return total / len(PROMPTS)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """After each optimiser step."""
        model.eval()
        self.values.append(self.of(model))
        model.train()

    @property
    def shares(self) -> np.ndarray:
        """Share of the way from the reference's objective to the optimum's, after each step."""
        return (np.array(self.values) - self.start) / (self.best - self.start)


def train(testbed: Testbed, reward: Any, folder: Path, *, baseline: Any, generations: int, rollouts: int, steps: int,
          learning_rate: float, seed: int) -> Objective:  # fmt: skip
    """One training; the schedule and everything else as `align` has it."""
    set_seed(seed)
    model, tokenizer = load_policy(testbed.reference)
    watch = Objective(testbed, reward)
    config = online._rloo_config(
        folder, steps=steps, prompts_per_step=max(1, rollouts // generations), num_generations=generations,
        max_new_tokens=2, learning_rate=learning_rate, seed=seed, save_steps=10**6, trust_remote_code=False,
        overrides={
            "save_strategy": "no", "lr_scheduler_type": "constant", "lr_scheduler_kwargs": {}, "warmup_steps": 0
        },
    )  # fmt: skip
    rows = online._training_rows(PROMPTS, steps * max(1, rollouts // generations), seed)
    steering = Steering(reward, None, folder / "steps.jsonl", steps, None)
    trainer = online._make_trainer(model, tokenizer, reward, rows, steering, None, baseline, config)
    trainer.add_callback(watch)
    trainer.train()
    return watch


def tokens(options: argparse.Namespace) -> None:
    """Sampled rollouts to 95 % of the optimum's objective."""
    print(
        f"{'transform':16s}{'baseline':16s}{'per prompt':>11s}{'learning rate':>15s}{'steps to 95 % by seed':>28s}"
        f"{'median':>8s}{'end share':>11s}",
        flush=True,
    )
    with tempfile.TemporaryDirectory() as scratch:
        testbed = Testbed(Path(scratch) / "reference", vocabulary=12)
        for name in options.transforms:
            transform, beta = _transform_and_beta(name, options.kl)
            for baseline in ("leave-one-out", "known"):
                for generations in options.generations:
                    if generations == 1 and baseline == "leave-one-out":
                        continue
                    for learning_rate in options.learning_rates:
                        reached, ends = [], []
                        for seed in range(options.seeds):
                            reward = testbed.reward(transform, beta)
                            watch = train(
                                testbed, reward, Path(scratch) / "run", baseline=baseline, generations=generations,
                                rollouts=options.rollouts, steps=options.steps, learning_rate=learning_rate, seed=seed,
                            )  # fmt: skip
                            above = np.flatnonzero(watch.shares >= 0.95)
                            reached.append(int(above[0]) + 1 if len(above) else None)
                            ends.append(float(watch.shares[-5:].mean()))
                        median = float(np.median([step or np.inf for step in reached]))
                        print(f"{name:16s}{baseline:16s}{generations:11d}{learning_rate:15g}{reached!s:>28s}"
                              f"{median:8.0f}{np.mean(ends):11.3f}", flush=True)  # fmt: skip
                        if options.json:
                            with Path(options.json).open("a") as file:
                                row = [name, baseline, generations, learning_rate, reached, ends]
                                file.write(json.dumps(row) + "\n")


PROCEDURES = {"best-of-4": BestOfN(4), "worst-of-4": WorstOfN(4)}  # whose optimal transforms are trained with
NAMED = {"identity": Identity(), "exponential+10": Exponential(10.0)}
SOLVERS = {
    # name: (solver, baseline, share of the steps that anneal)
    "plain RLOO": ("online", "leave-one-out", 0.0),
    "online": ("online", "known", ANNEAL),
    "mixed": ("mixed", None, None),
    "offline-regression": ("offline-regression", None, None),
}


def solvers(options: argparse.Namespace) -> None:
    """Rollouts sampled in training until 95 % of the optimum's objective, where the references are stored anyway."""
    print(f"{'transform':16s}{'solver':20s}{'learning rate':>14s}{'sampled to 95 % by seed':>30s}{'median':>8s}"
          f"{'end share':>11s}{'sampled in all':>16s}", flush=True)  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        testbed = Testbed(Path(scratch) / "reference", vocabulary=12)
        store = _stored(testbed, Path(scratch) / "store")
        for name in options.transforms:
            transform, beta = _transform_and_beta(name, options.kl)
            for label in SOLVERS:
                for learning_rate in options.learning_rates:
                    reached, ends, sampled = [], [], []
                    for seed in range(options.seeds):
                        folder = Path(scratch) / f"{name}-{label}-{learning_rate}-{seed}"
                        reward = testbed.reward(transform, beta)
                        at_steps = _train_solver(testbed, store, reward, folder, label, learning_rate, seed, options)
                        watch = Objective(testbed, testbed.reward(transform, beta))
                        watch.values = [watch.of(load_policy(model)[0]) for model, _ in at_steps]
                        above = np.flatnonzero(watch.shares >= 0.95)
                        reached.append(at_steps[above[0]][1] if len(above) else None)
                        ends.append(float(watch.shares[-1]))
                        sampled.append(at_steps[-1][1])
                    median = float(np.median([np.inf if count is None else count for count in reached]))
                    print(f"{name:16s}{label:20s}{learning_rate:14g}{reached!s:>30s}{median:8.0f}"
                          f"{np.mean(ends):11.3f}{np.mean(sampled):16.0f}", flush=True)  # fmt: skip


def _stored(testbed: Testbed, folder: Path) -> RolloutStore:
    """The references, as a run stores them; the testbed is calibrated with their rewards."""
    model, tokenizer = load_policy(testbed.reference)
    store = RolloutStore.open(folder, RolloutKey.of(testbed.reference, tokenizer, max_new_tokens=TOKENS, seed=0))
    source = FunctionReward(hashed_reward)
    sample(model, tokenizer, PROMPTS, testbed.num_ref, store=store)
    score_store(store, source, PROMPTS)
    testbed.calibrator.fit(store.rewards_PK(source.key, [prompt.id for prompt in PROMPTS], testbed.num_ref))
    return store


def _train_solver(
    testbed: Testbed, store: RolloutStore, reward: TransformedReward, folder: Path, label: str, learning_rate: float,
    seed: int, options: argparse.Namespace,
) -> list[tuple[Path, int]]:  # fmt: skip
    """Train, and give every checkpoint with the rollouts sampled until then."""
    solver, baseline, anneal = SOLVERS[label]
    constant = {"lr_scheduler_type": "constant", "lr_scheduler_kwargs": {}, "warmup_steps": 0}
    common: dict[str, Any] = {
        "max_new_tokens": TOKENS, "steps": options.steps, "learning_rate": learning_rate, "seed": seed,
        "save_steps": options.every, "keep_checkpoints": True,
    }  # fmt: skip
    group = options.rollouts // len(PROMPTS)
    if solver == "online":
        online.align(
            testbed.reference, folder, PROMPTS, reward, baseline=baseline, anneal=anneal,
            prompts_per_step=len(PROMPTS), num_generations=group, rloo=constant, **common,
        )  # fmt: skip
    else:
        pool = stored_rollouts(store, PROMPTS, testbed.calibrator, [prompt.id for prompt in PROMPTS])
        fresh = FreshRollouts(reward, every=options.refresh_every, num_prompts=len(PROMPTS), num_samples=group)
        loss = Regression(reward.transform, reward.beta)
        align_offline(
            testbed.reference, folder, pool, loss, rollouts_per_step=options.rollouts, trainer=constant,
            fresh=fresh if solver == "mixed" else None, **common,
        )  # fmt: skip
    checkpoints = sorted((folder / "checkpoints").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    out = []
    for path in checkpoints:
        step = int(path.name.split("-")[1])
        rounds = {"online": step, "offline-regression": 0}.get(solver)
        if rounds is None:  # mixed: a round is drawn one step before the window that it serves; the first has none
            rounds = min(step + 1, options.steps - 1) // options.refresh_every
        out.append((path, rounds * options.rollouts))
    return out


def _transform_and_beta(name: str, kl: float) -> tuple[RewardTransform, float]:
    """A transform by its name here, and the β that theory gives it at this KL."""
    if name in PROCEDURES:
        optimum = optimum_at_kl(PROCEDURES[name], kl)
        return optimum.transform, optimum.beta
    transform = NAMED[name]
    return transform, tilt_at_kl(transform, kl).beta


def step(options: argparse.Namespace) -> None:
    """Seconds per step beside plain RLOOTrainer with the same reward source, interleaved."""
    spent: dict[str, list[float]] = {"ours": [], "plain": []}
    with tempfile.TemporaryDirectory() as scratch:
        testbed = Testbed(Path(scratch) / "reference", vocabulary=64)
        for _ in range(options.repeats):
            for name in spent:
                spent[name].append(_seconds_per_step(testbed, name, Path(scratch), options))
                print(f"{name:8s}{spent[name][-1]:8.3f} s per step", flush=True)
    ratios = np.array(spent["ours"]) / np.array(spent["plain"])
    print(f"ours / plain RLOO: median {np.median(ratios):.3f}, from {ratios.min():.3f} to {ratios.max():.3f}")


def _seconds_per_step(testbed: Testbed, name: str, scratch: Path, options: argparse.Namespace) -> float:
    times: list[float] = []

    class Timed(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            times.append(time.perf_counter())

    set_seed(0)
    model, tokenizer = load_policy(testbed.reference)
    reward = testbed.reward(Identity(), 0.1)
    config = online._rloo_config(
        scratch / "run", steps=options.steps, prompts_per_step=16, num_generations=16, max_new_tokens=24,
        learning_rate=1e-5, seed=0, save_steps=10**6, trust_remote_code=False, overrides={"save_strategy": "no"},
    )  # fmt: skip
    rows = online._training_rows(PROMPTS, options.steps * 16, 0)
    if name == "ours":
        steering = Steering(reward, None, scratch / "steps.jsonl", options.steps, None)
        trainer: Any = online._make_trainer(model, tokenizer, reward, rows, steering, None, "known", config)
    else:
        plain = reward.source.score
        trainer = RLOOTrainer(
            model=model, args=config, train_dataset=rows, processing_class=tokenizer,
            reward_funcs=lambda prompts, completions, **_: plain(prompts, completions).tolist(),
        )  # fmt: skip
    trainer.add_callback(Timed())
    trainer.train()
    return float(np.median(np.diff(times)))


def main() -> None:
    """Read the arguments and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["tokens", "solvers", "step"])
    parser.add_argument("--kl", type=float, default=0.5)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rollouts", type=int, default=64)
    parser.add_argument("--every", type=int, default=5, help="solvers: steps between measurements")
    parser.add_argument("--refresh-every", type=int, default=10, help="solvers: steps between mixed training's rounds")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--generations", type=int, nargs="+", default=[1, 2, 4, 16])
    parser.add_argument("--learning-rates", type=float, nargs="+", default=[3e-3])
    parser.add_argument("--transforms", nargs="+", default=["identity", "best-of-4", "worst-of-4"],
                        choices=[*NAMED, *PROCEDURES])  # fmt: skip
    parser.add_argument("--json", help="append every row to this file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    with quiet():
        {"tokens": tokens, "solvers": solvers, "step": step}[options.what](options)


if __name__ == "__main__":
    main()
