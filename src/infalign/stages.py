"""The work of each stage: read what earlier ones left in the run folder, add one thing to it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from infalign import processes
from infalign.calibration import RewardCalibrator
from infalign.calibration_report import calibration_report
from infalign.checks import plan_transforms
from infalign.combined_calibration import CombinedCalibrator
from infalign.data import Prompt, PromptSet
from infalign.errors import InputError
from infalign.evaluation.compare import compare_pairs
from infalign.evaluation.fresh import exact_kls, measure_store
from infalign.evaluation.record import FILE, Evaluation
from infalign.evaluation.results import MethodResult
from infalign.inputs import split_prompts, testbed_text
from infalign.model_card import CardFacts, write_model_card
from infalign.recipe import GoldReward, Recipe, RolloutEndpoint, Training
from infalign.recipe.baselines import baseline_name
from infalign.report.build import build_report
from infalign.rollouts.endpoint import SAMPLER, sample_endpoint
from infalign.rollouts.fill import compute_logprobs
from infalign.rollouts.http import Endpoint
from infalign.rollouts.key import RolloutKey, model_fingerprint, tokenizer_fingerprint
from infalign.rollouts.models import load_policy, load_tokenizer
from infalign.rollouts.progress import Progress
from infalign.rollouts.sample import sample
from infalign.rollouts.score import score_store
from infalign.rollouts.store import RolloutStore
from infalign.run_folder import versions, write_json, write_text
from infalign.run_rewards import RunRewards, open_reward, scored_by_all
from infalign.testbed.models import DOCSTRING_REFERENCE, DOCSTRING_REWARD, train_reference, train_reward_model
from infalign.theory.finite_k import finite_k_prediction
from infalign.theory.plan import optimum_at_kl
from infalign.training.fresh import FreshRollouts
from infalign.training.landing import Landing
from infalign.training.losses import OfflineLoss
from infalign.training.methods import baseline_beta, baseline_loss, baseline_reward, is_online, solver_loss
from infalign.training.offline import OfflineResult, align_offline
from infalign.training.online import AlignmentResult, align
from infalign.training.pool import RolloutPool, stored_rollouts
from infalign.training.reward import TransformedReward
from infalign.training.self_consistent import SelfConsistentTransform
from infalign.transforms import Identity, RewardTransform, transform_from_dict


@dataclass(frozen=True)
class PlannedTransform:
    """A transform to align with, or a baseline, and its β at the planned KL."""

    name: str
    transform: RewardTransform | SelfConsistentTransform  # the identity for a baseline, which has none
    beta: float
    baseline: dict[str, Any] | None = None

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> PlannedTransform:
        """Inverse of what `plan.json` holds."""
        if "baseline" in content:
            return cls(content["name"], Identity(), content["beta"], content["baseline"])
        described = content["transform"]
        own = described["kind"] == SelfConsistentTransform.label
        transform = SelfConsistentTransform.from_dict(described) if own else transform_from_dict(described)
        return cls(content["name"], transform, content["beta"])

    def trains_online(self, solver: str) -> bool:
        """Whether it is trained by the online solver, where the recipe's transforms use `solver`."""
        return solver == "online" if self.baseline is None else is_online(self.baseline)

    def training_settings(self, training: Training) -> dict[str, Any]:
        """The settings that decide what its training gives."""
        if self.trains_online(training.solver):
            return training.model_dump(exclude={"save_steps", "solver", "refresh_every", "offline"})
        shared = {
            "steps",
            "prompts_per_step",
            "num_generations",
            "learning_rate",
            "lora",
            "keep_checkpoints",
            "offline",
        }
        if self.baseline is None:
            shared |= {"solver", "refresh_every"} if training.solver == "mixed" else {"solver"}
        return training.model_dump(include=shared)


class Stages:
    """The stages of one recipe in one run folder.

    Args:
        recipe: The experiment.
        out: The run folder.
        say: Tells the user one plain line.
    """

    def __init__(self, recipe: Recipe, out: Path, say: Callable[[str], None]) -> None:
        self.recipe = recipe
        self.out = out
        self.say = say
        self.rewards = RunRewards(recipe, testbed_model=str(out / "models" / "reward"))

    # --- the testbed, for a recipe that brings no models ---

    def train_reference(self, progress: Progress) -> None:
        """A tiny reference policy, trained from scratch."""
        assert self.recipe.testbed is not None, "the caller checked"
        result = train_reference(
            testbed_text(self.recipe)[0],
            self.out / "models" / "reference",
            spec=replace(DOCSTRING_REFERENCE, **self.recipe.testbed.reference.model_dump(exclude_none=True)),
            seed=self.recipe.seed,
            progress=progress,
        )
        told = f"{result.parameters:,} parameters, {result.train_examples:,} examples"
        if result.held_out_perplexity is not None:
            told += f", held-out perplexity {result.held_out_perplexity:.1f} per token"
        self.say(f"  {told}")

    def train_reward_model(self, progress: Progress) -> None:
        """A tiny reward model."""
        assert self.recipe.testbed is not None, "the caller checked"
        result = train_reward_model(
            testbed_text(self.recipe)[1],
            self.reference,
            self.out / "models" / "reward",
            spec=replace(DOCSTRING_REWARD, **self.recipe.testbed.reward_model.model_dump(exclude_none=True)),
            seed=self.recipe.seed,
            progress=progress,
        )
        told = f"{result.train_pairs:,} pairs ({result.truncated} truncated)"
        if result.held_out_accuracy is not None:
            told += f", held-out accuracy {result.held_out_accuracy:.3f}"
        self.say(f"  {told}")

    # --- rollouts ---

    def split_prompts(self, progress: Progress) -> None:
        """Training and evaluation prompts, written down once for all later stages."""
        train, evaluation = split_prompts(self.recipe)
        for name, prompts in (("train", train), ("evaluation", evaluation)):
            rows = [{"id": p.id, "prompt": p.prompt, "row": p.row} for p in prompts]
            lines = [json.dumps(row, default=str) for row in rows]
            write_text(self.out / "prompts" / f"{name}.jsonl", "\n".join(lines) + "\n")
        duplicates = train.duplicates + evaluation.duplicates
        told = f"{len(train)} training and {len(evaluation)} evaluation prompts"
        self.say(f"  {told}" + (f" ({duplicates} duplicates left out)" if duplicates else ""))

    def draw_reference(self, progress: Progress) -> None:
        """The K reference rollouts per training prompt that calibrate the reward."""
        self._draw("reference", self.reference, "train", self.recipe.rollouts.num_ref, self.recipe.seed, progress)

    def score_reference(self, progress: Progress) -> None:
        """Their rewards."""
        self.rewards.score(self.store("reference"), self.prompts("train"), progress)

    def count_reference(self) -> dict[str, int]:
        """Of the reference rollouts of the training prompts: their tokens, how many were cut, and how many unscored."""
        store, prompts = self.store("reference"), self.prompts("train")
        ids, num_ref = prompts.ids, self.recipe.rollouts.num_ref
        return {
            "prompts": len(prompts),
            "rollouts": len(prompts) * num_ref,
            "tokens": int(store.column_PK("num_tokens", ids, num_ref).sum()),
            "truncated": int((store.column_PK("finish_reason", ids, num_ref) == "length").sum()),
            "unscored": int((~scored_by_all(self.rewards.read_PKM(store, ids, num_ref))).sum()),
        }

    # --- calibration ---

    def fit_calibration(self, progress: Progress) -> None:
        """The reward's quantiles under the reference, prompt by prompt (M5)."""
        prompts, num_ref = self.prompts("train"), self.recipe.rollouts.num_ref
        rewards_PKM = self.rewards.read_PKM(self.store("reference"), prompts.ids, num_ref)
        scored_PK = scored_by_all(rewards_PKM)
        calibrator = self.rewards.fit(rewards_PKM, prompts.ids)
        calibrator.save(self.out / "calibration" / "calibrator")
        # The report and the spread are of the first reward; prompts with an unscored rollout cannot take part.
        whole_PK = rewards_PKM[scored_PK.all(axis=1), :, 0]
        write_json(
            self.out / "calibration" / "summary.json",
            {
                "prompts": len(prompts),
                "num_ref": num_ref,
                "unscored": int((~scored_PK).sum()),
                "fewest_references": int(scored_PK.sum(axis=1).min()),
                "tie_mass": calibrator.tie_mass,
                "within_prompt_std": float(whole_PK.std(axis=1).mean()) if len(whole_PK) else None,
                "between_prompt_std": float(whole_PK.mean(axis=1).std()) if len(whole_PK) else None,
                # Two halves of fewer than two references each tell nothing.
                "report": calibration_report(whole_PK).to_dict() if num_ref >= 4 and len(whole_PK) else None,
            },
        )

    def make_plan(self, progress: Progress) -> None:
        """β for every transform, all at the same planned KL."""
        recipe = self.recipe
        kl, planned = plan_transforms(recipe)
        content = {
            "procedure": recipe.target_procedure.to_dict(),
            "kl": kl,
            "kl_budget": recipe.kl_budget,
            "num_ref": recipe.rollouts.num_ref,
            "win_rate_lost": self._win_rate_lost(kl),
            "transforms": planned,
            "baselines": [self._plan_baseline(described, kl) for described in recipe.baselines],
        }
        write_json(self.out / "plan.json", content)

    def _plan_baseline(self, described: dict[str, Any], kl: float) -> dict[str, Any]:
        ids = self.prompts("train").ids
        beta = baseline_beta(described, self.rewards.source(), self.calibrator(), ids, kl)
        return {"name": baseline_name(described), "baseline": described, "beta": beta}

    def _win_rate_lost(self, kl: float) -> float | None:
        """What this many references cost the optimal transform in theory; None where they cannot spend this KL."""
        try:
            optimum = optimum_at_kl(self.recipe.target_procedure, kl)
            return finite_k_prediction(optimum, self.recipe.rollouts.num_ref).win_rate_lost
        except InputError as error:
            self.say(f"  {error}")
            return None

    # --- training ---

    def align(self, planned: PlannedTransform, progress: Progress) -> None:
        """Align the reference with one transform, by the recipe's solver, or with one baseline."""
        recipe, prompts, training = self.recipe, self.prompts("train"), self.recipe.training
        # The KL that decides the landing is measured on prompts that no update has seen, where there are enough.
        kept = min(len(prompts) // 4, 128) if recipe.kl_budget is not None else 0
        out = self.out / "policies" / planned.name
        common: dict[str, Any] = {
            "max_new_tokens": recipe.rollouts.max_new_tokens,
            "kl_budget": recipe.kl_budget,
            "kl_prompts": prompts[:kept],
            "seed": recipe.seed,
            "trust_remote_code": recipe.policy.trust_remote_code,
            "allow_pickle": recipe.policy.allow_pickle,
            "progress": progress,
        }
        if planned.trains_online(training.solver):
            reward = self.transformed_reward(planned)
            result: AlignmentResult | OfflineResult = align(
                self.reference, out, prompts[kept:], reward, **common, **training.online
            )
        else:
            mixed = planned.baseline is None and training.solver == "mixed"
            result = align_offline(
                self.reference,
                out,
                self._stored_rollouts(prompts[kept:], progress),
                self._loss(planned),
                rollouts_per_step=training.prompts_per_step * training.num_generations,
                trainer=training.offline,
                fresh=self._fresh_rollouts(planned) if mixed else None,
                **common,
                **training.model_dump(include={"steps", "learning_rate", "lora", "save_steps", "keep_checkpoints"}),
            )
        if processes.is_main():
            if result.landing is not None:
                self.say(f"  {result.landing}")
            self._write_card(planned, None)

    def _loss(self, planned: PlannedTransform) -> OfflineLoss:
        if planned.baseline is not None:
            return baseline_loss(planned.baseline, planned.beta)
        return solver_loss(self.recipe.training.solver, planned.transform, planned.beta)

    def _fresh_rollouts(self, planned: PlannedTransform) -> FreshRollouts:
        training = self.recipe.training
        return FreshRollouts(
            self.transformed_reward(planned),
            every=training.refresh_every,
            num_prompts=training.prompts_per_step,
            num_samples=training.num_generations,
        )

    def _write_card(self, planned: PlannedTransform, result: MethodResult | None) -> None:
        """The model card of an aligned policy, with what was measured if that is known."""
        recipe, calibration = self.recipe, self.read_json("calibration/summary.json")
        trained = self.read_json(f"policies/{planned.name}/result.json")
        folder = self.policy_folder(planned.name)
        landing = trained["landing"]
        facts = CardFacts(
            name=recipe.name,
            base=self.reference,
            procedure=recipe.target_procedure.label,
            transform=planned.name,
            beta=trained["beta"],
            planned_kl=self.read_json("plan.json")["kl"],
            kl_budget=recipe.kl_budget,
            landing=None if landing is None else Landing(**landing),
            steps=recipe.training.steps,
            rollouts_per_step=recipe.training.prompts_per_step * recipe.training.num_generations,
            max_new_tokens=recipe.rollouts.max_new_tokens,
            adapter=(folder / "adapter_config.json").exists(),
            rewards=tuple(one.function or one.name or one.model or "reward of the testbed" for one in recipe.reward),
            reward_key=self.rewards.source().key,
            num_ref=calibration["num_ref"],
            ties=recipe.calibration.ties,
            tie_mass=calibration["tie_mass"],
            prompts=recipe.prompts.source or "prompts of the testbed",
            num_train=len(self.prompts("train")),
            num_evaluation=len(self.prompts("evaluation")),
            seed=recipe.seed,
            versions={name: version for name, version in versions().items() if name != "platform"},
            result=result,
        )
        write_model_card(folder, facts)

    def _stored_rollouts(self, prompts: Sequence[Prompt], progress: Progress) -> RolloutPool:
        """The reference rollouts of these prompts; what a server did not give is computed first."""
        store, everyone, num_ref = self.store("reference"), self.prompts("train"), self.recipe.rollouts.num_ref
        if processes.is_main() and store.table(["logprob"])["logprob"].null_count:
            model, tokenizer = self._load(self.reference)
            compute_logprobs(store, model, tokenizer, everyone, progress=progress)
        processes.wait_for_all()
        scored_PK = scored_by_all(self.rewards.read_PKM(store, everyone.ids, num_ref))
        return stored_rollouts(store, prompts, self.calibrator(), everyone.ids, scored_PK=scored_PK)

    # --- evaluation ---

    def calibrate_evaluation(self, progress: Progress) -> None:
        """Several rewards: reference rollouts of the held-out prompts, by which their quantiles are combined there.

        They are drawn apart from those that are judged, so that a response's score depends on nothing but itself.
        """
        prompts, num_ref = self.prompts("evaluation"), self.recipe.rollouts.num_ref
        self._draw("evaluation-calibration", self.reference, "evaluation", num_ref, self.recipe.seed + 999, progress)
        store = self.store("evaluation-calibration")
        self.rewards.score(store, prompts, progress)
        rewards_PKM = self.rewards.read_PKM(store, prompts.ids, num_ref)
        self.rewards.fit(rewards_PKM, prompts.ids).save(self.out / "calibration-evaluation")

    def draw_for_evaluation(self, name: str, model: str, number: int, progress: Progress) -> None:
        """Fresh rollouts on held-out prompts, scored, and (for a policy) its log-ratios to the reference."""
        folder, prompts, samples = f"evaluation-{name}", self.prompts("evaluation"), self.recipe.evaluation.num_samples
        # Another seed for every model: its rollouts are independent of the others' and of the calibration's.
        self._draw(folder, model, "evaluation", samples, self.recipe.seed + 1000 * number, progress)
        self.rewards.score(self.store(folder), prompts, progress, retry_unscored=True)
        if self.rewards.combined:
            calibrator = CombinedCalibrator.load(self.out / "calibration-evaluation")
            self.rewards.combine(self.store(folder), calibrator, prompts.ids, samples)
        if name != "reference":
            reference = model_fingerprint(self.reference)
            exact_kls(self.store(folder), prompts, samples, reference, partial(self._pair, model), progress)

    def score_gold(self, gold: GoldReward, progress: Progress) -> None:
        """Scores by a reward that training never saw, for every model's rollouts."""
        source, prompts = open_reward(gold), self.prompts("evaluation")
        if source.key in [one.key for one in self.rewards.sources()]:
            raise InputError(
                "this is a reward that is trained on, so it tells nothing new",
                where=f"evaluation.gold {gold.label}",
                mend="Remove it, or give another",
            )
        for name in ("reference", *(planned.name for planned in self.planned())):
            score_store(self.store(f"evaluation-{name}"), source, prompts, progress=progress, retry_unscored=True)

    def measure(self, progress: Progress) -> None:
        """Win rates, KL and their errors for every policy, and paired comparisons."""
        recipe, prompts = self.recipe, self.prompts("evaluation")
        samples, source = recipe.evaluation.num_samples, self.rewards.source()
        gold = {one.label: open_reward(one).key for one in recipe.evaluation.gold}
        reference = model_fingerprint(self.reference)
        names = [planned.name for planned in self.planned()]
        results = [
            measure_store(
                name,
                store := self.store(f"evaluation-{name}"),
                self.store("evaluation-reference"),
                exact_kls(store, prompts, samples, reference, partial(self._pair, str(self.policy_folder(name)))),
                prompts,
                recipe.evaluation_procedures,
                reward_key=source.key,
                reward=str(source),
                gold=gold,
                confidence=recipe.evaluation.confidence,
            )
            for name in names
        ]
        evaluation = Evaluation(
            name=recipe.name,
            procedure=recipe.target_procedure.to_dict(),
            kl_budget=recipe.kl_budget,
            reference=reference,
            reward=source.key,
            gold=gold,
            max_new_tokens=recipe.rollouts.max_new_tokens,
            stores={name: f"rollouts/evaluation-{name}" for name in ("reference", *names)},
            results=results,
            comparisons=[one.to_dict() for one in compare_pairs([(results[0], other) for other in results[1:]])],
            baseline=names[1] if len(names) > 1 else None,
            settings=recipe.model_dump(),
            versions=versions(),
        )
        write_json(self.out / FILE, evaluation.to_dict())
        for planned, result in zip(self.planned(), results, strict=True):
            self._write_card(planned, result)

    def write_report(self, progress: Progress) -> None:
        """The HTML report."""
        build_report(self.out)

    # --- what the run folder holds ---

    @property
    def reference(self) -> str:
        """The reference policy: the recipe's, or the testbed's."""
        return self.recipe.policy.model or str(self.out / "models" / "reference")

    def calibrator(self) -> RewardCalibrator | CombinedCalibrator:
        """The calibration on the training prompts."""
        kind = CombinedCalibrator if self.rewards.combined else RewardCalibrator
        return kind.load(self.out / "calibration" / "calibrator")

    def transformed_reward(self, planned: PlannedTransform) -> TransformedReward:
        """What online training with one transform or baseline maximises.

        Raises:
            InputError: If the baseline is a loss on stored rollouts.
        """
        source, calibrator, ids = self.rewards.source(), self.calibrator(), self.prompts("train").ids
        if planned.baseline is None:
            return TransformedReward(
                source, calibrator, ids, planned.transform, planned.beta, procedure=self.recipe.target_procedure
            )
        if not is_online(planned.baseline):
            raise InputError(f"{planned.name} is a loss on stored rollouts, not a reward", where="compare_with",
                             mend="Choose a transform, or the baseline raw, standardised or log-sigmoid")  # fmt: skip
        return baseline_reward(
            planned.baseline, source, calibrator, ids, planned.beta, procedure=self.recipe.target_procedure
        )

    def policy_folder(self, name: str) -> Path:
        """Where an aligned model is."""
        return self.out / "policies" / name / "model"

    def planned(self) -> list[PlannedTransform]:
        """The transforms and baselines to align with; known once the plan is made."""
        plan = self.read_json("plan.json")
        return [PlannedTransform.from_dict(entry) for entry in (*plan["transforms"], *plan.get("baselines", ()))]

    def prompts(self, side: str) -> PromptSet:
        """The prompts of one side: `train` or `evaluation`."""
        lines = (self.out / "prompts" / f"{side}.jsonl").read_text(encoding="utf-8").split("\n")
        rows = [json.loads(line) for line in lines if line]
        return PromptSet(tuple(Prompt(row["prompt"], row["row"]) for row in rows))

    def store(self, folder: str) -> RolloutStore:
        """A rollout store of this run."""
        return RolloutStore.open(self.out / "rollouts" / folder)

    def read_json(self, name: str) -> Any:
        """A JSON file of this run."""
        return json.loads((self.out / name).read_text(encoding="utf-8"))

    def _draw(self, folder: str, model: str, side: str, count: int, seed: int, progress: Progress) -> None:
        if model == self.reference and self.recipe.rollouts.endpoint is not None:
            self._draw_at_endpoint(self.recipe.rollouts.endpoint, folder, side, count, seed, progress)
            return
        policy, tokenizer = self._load(model)
        key = RolloutKey.of(model, tokenizer, max_new_tokens=self.recipe.rollouts.max_new_tokens, seed=seed)
        sample(
            policy,
            tokenizer,
            self.prompts(side),
            count,
            store=RolloutStore.open(self.out / "rollouts" / folder, key),
            batch_size=self.recipe.rollouts.batch_size,
            progress=progress,
        )

    def _draw_at_endpoint(
        self, served: RolloutEndpoint, folder: str, side: str, count: int, seed: int, progress: Progress
    ) -> None:
        tokenizer = load_tokenizer(self.reference, trust_remote_code=self.recipe.policy.trust_remote_code)
        key = RolloutKey(
            f"served:{served.model}",
            tokenizer_fingerprint(tokenizer),
            max_new_tokens=self.recipe.rollouts.max_new_tokens,
            seed=seed,
            sampler=SAMPLER,
        )
        sample_endpoint(
            Endpoint(served.url, api_key_variable=served.api_key_variable),
            served.model,
            self.prompts(side),
            count,
            store=RolloutStore.open(self.out / "rollouts" / folder, key),
            concurrency=served.concurrency,
            count_tokens=lambda text: len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]),
            progress=progress,
        )

    def _pair(self, model: str) -> tuple[Any, Any, Any]:
        """A policy, the reference, and the tokenizer of both."""
        policy, tokenizer = self._load(model)
        return policy, self._load(self.reference)[0], tokenizer

    def _load(self, model: str) -> Any:
        policy = self.recipe.policy
        return load_policy(model, trust_remote_code=policy.trust_remote_code, allow_pickle=policy.allow_pickle)
