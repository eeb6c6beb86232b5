"""How much of the theory's gain a trained language model captures, and where the rest is lost.

    infalign rollout recipes/hh_helpful_tiny.yaml && infalign calibrate recipes/hh_helpful_tiny.yaml
    python benchmarks/gain_captured.py runs/hh_helpful_tiny --out DIR [--rewards linear] [--steps 300] ...

For every combination of reward, procedure, transform and solver one policy is trained at the β that theory gives it for
`--kl` nats (nothing steers or lands it, unless `--land`), and measured on training and held-out prompts with fresh
rollouts and fresh references:

- W and KL; gain: (W − ½)/(limit(KL) − ½); share of the objective: (J − ½)/(J* − ½), J = W − β KL at the optimum's β;
- efficiency: how much of the KL moved ranks at all (M11).

Rewards that a small policy can follow, unlike a reward model of its own size: `additive` sums a random weight for each
token; `linear` sums each token's output embedding along one random direction, so that a shift of the last hidden state
expresses it. One line per training in DIR/results.jsonl; the same command again goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from infalign.calibration.calibrator import RewardCalibrator
from infalign.estimators import moved, sequence_kl, useful_kl, win_rates
from infalign.procedures import procedure_from_name
from infalign.rewards.score import score_store
from infalign.rewards.source import FunctionReward, RewardSource
from infalign.rollouts.key import RolloutKey, model_fingerprint
from infalign.rollouts.logprobs import log_ratios
from infalign.rollouts.models import load_policy
from infalign.rollouts.sample import sample
from infalign.rollouts.store import RolloutStore
from infalign.run.stages.run import Run, open_run
from infalign.run.testbed.quiet import quiet
from infalign.theory.alternatives import tilt_at_kl
from infalign.theory.plan import limit, optimum_at_kl
from infalign.training.fresh import FreshRollouts
from infalign.training.methods import CalibratedMethod, SelfConsistentMethod, comparator_from_dict
from infalign.training.offline import align_offline
from infalign.training.online import align
from infalign.training.pool import stored_rollouts
from infalign.training.reward import TransformedReward
from infalign.training.self_consistent import SelfConsistentTransform
from infalign.transforms import Identity

REWARDS = ["linear", "additive", "learned"]
HELD_OUT_SEED, SAMPLES = 7919, 32
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class TokenReward:
    """A fixed weight for each token of the reference, mean 0 and deviation 1 over the vocabulary, summed."""

    def __init__(self, reference: str, kind: str) -> None:
        model, self._tokenizer = load_policy(reference)
        rng = np.random.default_rng(5)
        if kind == "linear":
            embeddings = model.get_output_embeddings().weight.detach().double().numpy()
            weights = embeddings @ rng.normal(size=embeddings.shape[1])
        else:
            weights = rng.normal(size=model.config.vocab_size)
        self._weights = (weights - weights.mean()) / weights.std()

    def __call__(self, prompts: Sequence[Any], completions: Sequence[str], **_: Any) -> list[float]:
        """One reward per completion."""
        ids = self._tokenizer(list(completions), add_special_tokens=False)["input_ids"]
        return [float(self._weights[row].sum()) for row in ids]


class Experiment:
    """Everything that trainings of one reward have in common."""

    def __init__(self, run: Run, source: RewardSource, out: Path, options: argparse.Namespace) -> None:
        self.run, self.source, self.out, self.options = run, source, out, options
        by_length = {
            side: sorted(run.prompts(side), key=lambda prompt: len(str(prompt.prompt)))
            for side in ("train", "evaluation")
        }
        self.sides = {side: prompts[: options.prompts] for side, prompts in by_length.items()}
        self.landing = by_length["train"][options.prompts : options.prompts + 64]
        self.store = self._rollouts(run.reference, "train", options.num_ref, 1)
        self.calibrator = RewardCalibrator().fit(self._rewards(self.store, "train", options.num_ref))

    def _rollouts(self, model: str | Path, side: str, count: int, seed: int) -> RolloutStore:
        policy, tokenizer = load_policy(model)
        key = RolloutKey.of(model, tokenizer, max_new_tokens=self.options.tokens, seed=seed)
        store = RolloutStore.open(self.out / "rollouts" / f"{side}-{model_fingerprint(model)[:12]}-{seed}", key)
        sample(policy, tokenizer, self.sides[side], count, store=store)
        score_store(store, self.source, self.sides[side])
        return store

    def _rewards(self, store: RolloutStore, side: str, count: int) -> np.ndarray:
        return store.rewards_PK(self.source.key, [prompt.id for prompt in self.sides[side]], count)

    def train(self, procedure: Any, transform: str, solver: str, seed: int, folder: Path) -> tuple[Path, float]:
        """Train one policy; its folder and the seconds it took."""
        options, train = self.options, self.sides["train"]
        ids = [prompt.id for prompt in train]
        optimum = optimum_at_kl(procedure, options.kl)
        phi: Any = SelfConsistentTransform(procedure) if transform == "self-consistent" else optimum.transform
        beta = optimum.beta
        if transform == "identity":
            phi, beta = Identity(), tilt_at_kl(Identity(), options.kl).beta
        if transform == "raw":
            raw = comparator_from_dict({"baseline": "raw"})
            beta = raw.beta_for_kl(options.kl, self.calibrator)
            reward: TransformedReward = raw.reward(self.source, self.calibrator, ids, beta, procedure=procedure)
        else:
            reward = TransformedReward(self.source, self.calibrator, ids, phi, beta, procedure=procedure)
        common: dict[str, Any] = {
            "max_new_tokens": options.tokens, "steps": options.steps, "learning_rate": options.learning_rate,
            "seed": seed, "kl_budget": options.kl if options.land else None, "kl_prompts": self.landing,
            "lora": {"r": options.lora, "lora_alpha": options.lora, "target_modules": LINEAR} if options.lora else None,
        }  # fmt: skip
        begin = time.perf_counter()
        if solver == "online":
            result: Any = align(
                self.run.reference, folder, train, reward, prompts_per_step=options.prompts_per_step,
                num_generations=options.generations, **common,
            )  # fmt: skip
        else:
            fresh = FreshRollouts(reward, every=options.refresh_every, num_prompts=options.prompts_per_step,
                                  num_samples=options.generations)  # fmt: skip
            pool = stored_rollouts(self.store, train, self.calibrator, ids)
            kind: Any = SelfConsistentMethod if transform == "self-consistent" else CalibratedMethod
            result = align_offline(
                self.run.reference, folder, pool, kind(transform, phi).loss(beta, solver),
                rollouts_per_step=options.prompts_per_step * options.generations,
                fresh=fresh if solver == "mixed" else None, **common,
            )  # fmt: skip
        return result.model, time.perf_counter() - begin

    def measure(self, model: Path, procedure: Any) -> dict[str, Any]:
        """What a trained policy reached, on both sides."""
        optimum = optimum_at_kl(procedure, self.options.kl)
        best = optimum.win_rate - optimum.beta * optimum.kl - 0.5
        policy, tokenizer = load_policy(model)
        reference, _ = load_policy(self.run.reference)
        out: dict[str, Any] = {}
        for side, prompts in self.sides.items():
            ids = [prompt.id for prompt in prompts]
            store = self._rollouts(model, side, SAMPLES, HELD_OUT_SEED)
            references = self._rollouts(self.run.reference, side, self.options.num_ref, HELD_OUT_SEED)
            rewards_PG = self._rewards(store, side, SAMPLES)
            ref_rewards_PK = self._rewards(references, side, self.options.num_ref)
            ratios = log_ratios(policy, reference, tokenizer, prompts, store.lists_PK("token_ids", ids, SAMPLES))
            won, kl = win_rates(rewards_PG, ref_rewards_PK, [procedure])[0], sequence_kl(ratios.exact_kl_PG)
            useful = useful_kl(rewards_PG, ref_rewards_PK)
            objective = won.estimate - optimum.beta * kl.estimate - 0.5
            most = float(limit(procedure, [kl.estimate])[0])
            has_moved = moved(kl.estimate, kl.confidence_interval[0])  # else ratios to its KL and gain are noise
            out[side] = {
                "win_rate": won.estimate, "error": won.standard_error, "kl": kl.estimate,
                "gain": (won.estimate - 0.5) / (most - 0.5) if has_moved else float("nan"), "share": objective / best,
                "efficiency": useful.estimate / kl.estimate if has_moved else float("nan"),
            }  # fmt: skip
        return out


def main() -> None:
    """Read the arguments and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a calibrated run folder: its reference, reward and prompts")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rewards", nargs="+", default=["linear"], choices=REWARDS)
    parser.add_argument("--procedures", nargs="+", default=["best-of-4", "worst-of-4"])
    parser.add_argument("--transforms", nargs="+", default=["self-consistent", "identity"],
                        choices=["self-consistent", "optimal", "identity", "raw"])  # fmt: skip
    parser.add_argument("--solvers", nargs="+", default=["online"],
                        choices=["online", "mixed", "offline-regression"])  # fmt: skip
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--kl", type=float, default=0.5)
    parser.add_argument("--land", action="store_true", help="steer and land every training on --kl")
    parser.add_argument("--prompts", type=int, default=128, help="the shortest ones, on either side")
    parser.add_argument("--num-ref", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=8)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--prompts-per-step", type=int, default=16)
    parser.add_argument("--generations", type=int, default=16)
    parser.add_argument("--refresh-every", type=int, default=10)
    parser.add_argument("--learning-rate", type=float, default=5e-3)
    parser.add_argument(
        "--lora", type=int, default=2, help="rank of an adapter on all linear layers; 0 trains all weights"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    record = options.out / "results.jsonl"
    done = [json.loads(line) for line in record.read_text().splitlines()] if record.exists() else []
    run = open_run(options.run)
    print(f"{'training':56s}{'seconds':>8s}  on train, held out: W, KL, gain, share, efficiency", flush=True)
    settings = {name: getattr(options, name) for name in
                ("kl", "land", "prompts", "num_ref", "tokens", "steps", "prompts_per_step", "generations",
                 "refresh_every", "learning_rate", "lora")}  # fmt: skip
    for reward in options.rewards:
        source = run.rewards.source()
        if reward != "learned":
            source = FunctionReward(TokenReward(run.reference, reward), key=f"{reward} in tokens")
        experiment = None
        for name, transform, solver, seed in itertools.product(
            options.procedures, options.transforms, options.solvers, options.seeds
        ):
            what = dict(reward=reward, procedure=name, transform=transform, solver=solver, seed=seed, **settings)
            row = next((row for row in done if all(row.get(key) == value for key, value in what.items())), None)
            if row is None:
                with quiet():
                    experiment = experiment or Experiment(run, source, options.out / reward, options)
                    procedure = procedure_from_name(name)
                    folder = options.out / "-".join(map(str, what.values()))
                    model, seconds = experiment.train(procedure, transform, solver, seed, folder)
                    row = {**what, "seconds": seconds, **experiment.measure(model, procedure)}
                with record.open("a") as file:
                    file.write(json.dumps(row) + "\n")
            sides = "   ".join(
                " ".join(f"{row[side][key]:.3f}" for key in ("win_rate", "kl", "gain", "share", "efficiency"))
                for side in ("train", "evaluation")
            )
            label = " ".join([reward, name, transform, solver, str(seed)])
            print(f"{label:56s}{row['seconds']:8.0f}  {sides}", flush=True)


if __name__ == "__main__":
    main()
