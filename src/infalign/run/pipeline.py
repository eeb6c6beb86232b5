"""The stages of a run, in order: rollouts → calibration → training → evaluation → report.

What each stage depends on is written here; the work itself is in `stages/`. A stage is skipped when its inputs have
not changed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from infalign._io import processes
from infalign._io.files import storage_failure, write_json
from infalign._io.progress import Progress, no_progress
from infalign._io.wording import counted
from infalign.calibration.report import CalibrationReport
from infalign.errors import InfalignError, StorageError
from infalign.evaluation.record import Evaluation
from infalign.report.build import build_report
from infalign.report.calibration_display import calibration_lines
from infalign.report.table import text_table, through_lines
from infalign.rollouts.key import model_fingerprint
from infalign.run.checks import check_recipe
from infalign.run.folder import RECIPE, RunFolder, fingerprint
from infalign.run.inputs import prompts_fingerprint, source_fingerprint, testbed_fingerprint
from infalign.run.recipe import Recipe
from infalign.run.rewards import open_reward
from infalign.run.stages import calibrate, decoder, evaluate, reshape, rollout, testbed, train
from infalign.run.stages.planned import PlannedMethod
from infalign.run.stages.run import Run
from infalign.select.black_box import decoder_key
from infalign.training.landing import Landing

MEASURED = 3  # counts up when what is measured changes, so that older results are measured again
GROUPS = ("rollout", "calibrate", "train", "evaluate", "report")


class Reporter(Protocol):
    """Tells the user what is going on."""

    def say(self, text: str) -> None:
        """One plain line."""
        ...

    def stage(self, title: str) -> AbstractContextManager[Progress]:
        """A stage in progress."""
        ...


class Pipeline:
    """One recipe in one run folder.

    Args:
        recipe: The experiment.
        out: The run folder.
        reporter: Tells the user what is going on.
    """

    def __init__(self, recipe: Recipe, out: Path, reporter: Reporter) -> None:
        self.recipe = recipe
        self.out = out
        self.reporter = reporter
        self._run = Run(recipe, out, reporter.say)
        self._only: str | None = None
        self._decoder = recipe.measured_procedure

    def run(self, only: str | None = None) -> dict[str, Any]:
        """Do every stage, or one group of them on top of finished earlier ones.

        Of several processes (`accelerate launch`) the main one does this; the others only take part in the trainings.

        Args:
            only: One of `GROUPS`; `None` for all.

        Returns:
            `text` for a person, and what the last group produced for a program.

        Raises:
            MismatchError: If an earlier stage that is needed is missing or was made with other settings.
            StorageError: If another process is working in the folder, or it cannot be written.
        """
        processes.join()
        if not processes.is_main():
            return self._follow()
        self._only = only
        self.check()
        self.folder = RunFolder(self.out, self.recipe.name, self.reporter.say)
        do = (self._rollout, self._calibrate, self._train, self._evaluate, self._report)
        last = len(GROUPS) if only is None else GROUPS.index(only) + 1
        result: dict[str, Any] = {}
        with self.folder.writing():
            for group in do[:last]:
                result = group()
        processes.tell(None)
        return result

    def _follow(self) -> dict[str, Any]:
        """What the other processes do: train whatever the main one is about to train."""
        while (planned := processes.hear()) is not None:
            train.align_policy(self._run, planned, no_progress)
        return {}

    def _align(self, planned: PlannedMethod, progress: Progress) -> None:
        processes.tell(planned)
        train.align_policy(self._run, planned, progress)

    def check(self) -> dict[str, Any]:
        """Check what can be checked before anything is computed: files, columns, models, lengths, memory.

        Returns:
            `text`: the plan in words; and its numbers.
        """
        processes.join()
        return check_recipe(self.recipe, self.out)

    # --- what depends on what ---

    def _rollout(self) -> dict[str, Any]:
        recipe, run = self.recipe, self._run
        self._prepare_models()
        sources = {"source", "evaluation_source"}
        self._stage(
            "prompts",
            "rollout",
            {"sources": prompts_fingerprint(recipe), **recipe.prompts.model_dump(exclude=sources)},
            ["prompts"],
            partial(rollout.write_prompts, run),
        )
        self._stage(
            "rollouts",
            "rollout",
            {
                "reference": self._reference,
                "prompts": self._print_of("prompts"),
                **recipe.rollouts.identity,
                "seed": recipe.seed,
            },
            ["rollouts/reference"],
            partial(rollout.draw_reference, run),
            files=["rollouts/reference/manifest.json", "rollouts/reference/rollouts"],
            title=f"Draw {counted(recipe.rollouts.num_ref, 'reference rollout')} per prompt",
        )
        self._stage(
            "scores",
            "rollout",
            {"rollouts": self._print_of("rollouts"), "reward": self._reward},
            [],  # rewards lie beside the rollouts, one column set per source: nothing to put aside
            partial(rollout.score_reference, run),
            files=["rollouts/reference/rewards"],
            title="Score the reference rollouts",
        )
        if self._only != "rollout":
            return {}
        counts, where = rollout.count_reference(run), self.out / "rollouts" / "reference"
        told = f"{counted(counts['rollouts'], 'reference rollout')} of {counted(counts['prompts'], 'prompt')}, "
        told += counted(counts["tokens"], "token")
        told += f", {counts['truncated']} cut at {recipe.rollouts.max_new_tokens}, {counts['unscored']} unscored"
        return {"text": f"{told}, in {where}", **counts, "store": str(where)}

    def _calibrate(self) -> dict[str, Any]:
        recipe, run = self.recipe, self._run
        self._stage(
            "calibration",
            "calibrate",
            {"scores": self._print_of("scores"), **recipe.calibration.model_dump()},
            ["calibration"],
            partial(calibrate.fit_calibration, run),
            title="Calibrate the reward",
        )
        self._measure_procedure()
        recipe = self.recipe
        files = [source_fingerprint(t["file"]) for t in recipe.transforms if isinstance(t, dict) and "file" in t]
        chosen = recipe.model_dump(include={"procedure", "beta", "kl_budget"})
        compared = [one.described for one in recipe.comparators]
        self._stage(
            "plan",
            "calibrate",
            {
                **chosen,
                "transforms": recipe.transforms,
                "files": files,
                "num_ref": recipe.rollouts.num_ref,
                # What a comparator's β spends is found on the references themselves.
                **({"baselines": compared, "scores": self._print_of("calibration")} if compared else {}),
            },
            ["plan.json"],
            partial(calibrate.make_plan, run),
            title="Choose beta and transforms",
        )
        # From here on the folder can be used without the recipe's file, as a reward for other trainers.
        write_json(self.out / RECIPE, recipe.model_dump(mode="json"))
        plan, summary = run.read_json("plan.json"), run.read_json("calibration/summary.json")
        lines = [f"Calibrated on {counted(summary['prompts'], 'prompt')}, tie mass {summary['tie_mass']:.4f}"]
        if summary["unscored"]:
            few = f"the prompt with the fewest has {counted(summary['fewest_references'], 'reference')}"
            lines.append(
                f"{counted(summary['unscored'], 'unscored rollout takes', 'unscored rollouts take')} no part; {few}"
            )
        if summary.get("report"):
            lines.extend(calibration_lines(CalibrationReport.from_dict(summary["report"])))
        for entry in (*plan["transforms"], *plan.get("baselines", ())):
            lines.append(f"{entry['name']}: beta {entry['beta']:.4g} for a planned KL of {plan['kl']:.3f} nats")
        if plan["win_rate_lost"] is not None:
            told = (
                f"{counted(plan['num_ref'], 'reference')} per prompt cost {100 * plan['win_rate_lost']:.1f} "
                f"points of win rate"
            )
            lines.append(f"{told} at this KL, in theory, against infinitely many")
        return {"text": "\n".join(lines), "calibration": summary, "plan": plan}

    def _measure_procedure(self) -> None:
        """Where the recipe names a decoder: measure it, and go on with the procedure that it turned out to be."""
        measured = self._decoder
        if measured is None:
            return
        self._stage(
            "procedure",
            "calibrate",
            {
                "calibration": self._print_of("calibration"),
                "decoder": decoder_key(measured),
                "rollouts_per_prompt": measured.rollouts_per_prompt,
                "most_samples": self.recipe.evaluation.num_samples,
                "seed": self.recipe.seed,
            },
            ["rollouts/procedure", decoder.PROCEDURE],
            partial(decoder.measure_procedure, self._run, measured),
            title=f"Measure the procedure ({measured.label})",
        )
        self.recipe = self._run.recipe = self.recipe.with_procedure(decoder.fitted_procedure(self._run))

    def _evaluate_through(self, models: Mapping[str, tuple[str, str]]) -> None:
        """Where the recipe names a decoder: what it delivers with each model, beside the law fitted to it."""
        measured = self._decoder
        if measured is None:
            return
        for number, (name, (model, made_by)) in enumerate(models.items(), start=1):
            self._stage(
                f"through-{name}",
                "evaluate",
                {
                    "model": made_by,
                    "prompts": self._print_of("prompts"),
                    "reward": self._reward,
                    "decoder": decoder_key(measured),
                    "rollouts_per_prompt": measured.rollouts_per_prompt,
                    "max_new_tokens": self.recipe.rollouts.max_new_tokens,
                    "seed": self.recipe.seed,
                },
                [f"rollouts/through-{name}"],
                partial(decoder.run_through, self._run, name, model, number, measured),
                title=f"Run the decoder ({name})",
            )
        self._stage(
            "through",
            "evaluate",
            {
                "rollouts": [self._print_of(f"through-{name}") for name in models],
                "confidence": self.recipe.evaluation.confidence,
            },
            [decoder.THROUGH],
            partial(decoder.measure_through, self._run, measured),
            title="Measure win rates through the decoder",
        )

    def _train(self) -> dict[str, Any]:
        recipe, run = self.recipe, self._run
        trained: dict[str, Any] = {}
        for planned in run.planned():
            name = planned.name
            self._stage(
                f"align-{name}",
                "train",
                {
                    "calibration": self._print_of("calibration"),
                    "transform": fingerprint(planned.method.described),
                    "beta": planned.beta,
                    "kl_budget": recipe.kl_budget,
                    "training": planned.training_settings(recipe.training),
                    "seed": recipe.seed,
                    # With a KL budget a quarter is always kept.
                    **({} if recipe.kl_budget is not None or not len(run.kept_prompts()) else {"kept": True}),
                },
                [f"policies/{name}"],
                partial(self._align, planned),
                files=[f"policies/{name}/{part}" for part in ("model", "result.json", "steps.jsonl")],
                title=f"Align ({name})",
            )
            result = run.read_json(f"policies/{name}/result.json")
            result.pop("steps")
            trained[name] = {**result, "model": str(run.policy_folder(name))}
            if run.reshapes(planned):
                self._reshape(planned)
                fitted = run.read_json(f"policies/{name}/reshaped/{reshape.FILE}")
                trained[name]["reshaped"] = fitted | {"policy": str(run.reshaped_folder(name))}
        lines: list[str] = []
        for name, entry in trained.items():
            lines.append(f"{name}: {entry['model']} (final beta {entry['beta']:.4g})")
            if landing := entry["landing"]:
                lines.append(f"  {Landing(**landing)}")
            if fitted := entry.get("reshaped"):
                lines.append(f"  {fitted['reason']}")
        return {"text": "\n".join(lines), "policies": trained}

    def _reshape(self, planned: PlannedMethod) -> None:
        recipe, name = self.recipe, planned.name
        self._stage(
            f"reshape-{name}",
            "train",
            {
                "model": self._print_of(f"align-{name}"),
                "calibration": self._print_of("calibration"),
                "procedure": recipe.procedure,
                "kl": self._run.read_json("plan.json")["kl"],
                "report": recipe.evaluation.procedures,
                "inside": planned.mixture_weight,
                **recipe.reshape.model_dump(exclude={"methods"}),
                "seed": recipe.seed,
            },
            [f"policies/{name}/reshaped", f"rollouts/reshape-{name}"],
            partial(reshape.reshape_policy, self._run, planned),
            title=f"Reshape ({name})",
        )

    def _evaluate(self) -> dict[str, Any]:
        recipe, run = self.recipe, self._run
        models = {"reference": (run.reference, self._reference)}
        for one in run.evaluated():
            made_by = f"{'reshape' if one.reshaped else 'align'}-{one.method.name}"
            models[one.name] = (str(one.folder), self._print_of(made_by))
        combined: dict[str, Any] = {}
        if run.rewards.combined:
            self._stage(
                "evaluation-calibration",
                "evaluate",
                {
                    "reference": self._reference,
                    "prompts": self._print_of("prompts"),
                    "reward": self._reward,
                    **recipe.rollouts.identity,
                    **recipe.calibration.model_dump(),
                    "seed": recipe.seed,
                },
                ["rollouts/evaluation-calibration", "calibration-evaluation"],
                partial(evaluate.calibrate_evaluation, run),
                title="Calibrate the rewards on held-out prompts",
            )
            combined = {"calibration": self._print_of("evaluation-calibration")}
        for number, (name, (model, made_by)) in enumerate(models.items(), start=1):
            self._stage(
                f"evaluation-{name}",
                "evaluate",
                {
                    "model": made_by,
                    "reference": self._reference,
                    "prompts": self._print_of("prompts"),
                    "reward": self._reward,
                    "num_samples": recipe.evaluation.num_samples,
                    "max_new_tokens": recipe.rollouts.max_new_tokens,
                    "served": recipe.rollouts.identity["served"] if name == "reference" else None,
                    "seed": recipe.seed,
                    **combined,
                },
                [f"rollouts/evaluation-{name}"],
                partial(evaluate.draw_for_evaluation, run, name, model, number),
                title=f"Fresh rollouts ({name})",
            )
        drawn = [self._print_of(f"evaluation-{name}") for name in models]
        for gold in recipe.evaluation.gold:
            self._stage(
                f"gold-{gold.label}",
                "evaluate",
                {"rollouts": drawn, "reward": open_reward(gold).key},
                [],  # scores lie beside the rollouts, one column set per source: nothing to put aside
                partial(evaluate.score_gold, run, gold),
                files=[f"rollouts/evaluation-{name}/rewards" for name in models],
                title=f"Score by gold reward ({gold.label})",
            )
        self._stage(
            "evaluation",
            "evaluate",
            {
                "rollouts": drawn,
                "gold": {gold.label: self._print_of(f"gold-{gold.label}") for gold in recipe.evaluation.gold},
                "procedure": recipe.procedure,
                "kl_budget": recipe.kl_budget,
                "measured": MEASURED,
                **recipe.evaluation.model_dump(exclude={"gold"}),
            },
            ["evaluation.json"],
            partial(evaluate.measure, run),
            title="Measure win rates and KL",
        )
        self._evaluate_through(models)
        return self._results()

    def _report(self) -> dict[str, Any]:
        self._stage(
            "report",
            "report",
            {"evaluation": self._print_of("evaluation")},
            ["report.html"],
            lambda _: build_report(self.out),
            title="Write the report",
        )
        path = str(self.out / "report.html")
        results = self._results()
        return {**results, "text": f"{results['text']}\n\nReport: {path}", "report": path}

    def _results(self) -> dict[str, Any]:
        evaluation = Evaluation.read(self.out)
        n = self.recipe.target_procedure.n
        text = text_table(
            evaluation.results,
            evaluation.comparisons,
            n,
            evaluation.kl_budget,
            judge="the training reward",
            predictability=evaluation.predictability,
        )
        if self._decoder is None:
            return {"text": text, **evaluation.to_dict()}
        through = self._run.read_json(decoder.THROUGH)
        return {"text": f"{text}\n\n{through_lines(through)}", **evaluation.to_dict(), "through": through}

    def _prepare_models(self) -> None:
        """Know what the reference and the reward are; train the testbed's where the recipe brings none."""
        recipe, run = self.recipe, self._run
        own = None if recipe.testbed is None else recipe.testbed.model_dump()
        if recipe.policy.model is not None:
            self._reference = model_fingerprint(recipe.policy.model)
        else:
            assert own is not None, "held by the recipe"
            settings = {key: value for key, value in own.items() if key != "reward_model"}
            self._stage(
                "reference",
                "rollout",
                {"testbed": settings, "text": testbed_fingerprint(recipe), "seed": recipe.seed},
                ["models/reference"],
                partial(testbed.make_reference, run),
                title="Train the reference policy",
            )
            self._reference = self._print_of("reference")
        if recipe.reward[0].given:
            settings = [reward.model_dump(exclude={"batch_size"}) for reward in recipe.reward]
            self._reward = fingerprint([run.rewards.source().key, settings])
        else:
            settings = {"reference": self._reference, "testbed": own, "text": testbed_fingerprint(recipe)}
            self._stage(
                "reward-model",
                "rollout",
                {**settings, "seed": recipe.seed},
                ["models/reward"],
                partial(testbed.make_reward_model, run),
                title="Train the reward model",
            )
            self._reward = self._print_of("reward-model")

    # --- doing it ---

    def _stage(
        self,
        name: str,
        group: str,
        settings: Mapping[str, Any],
        outputs: list[str],
        work: Callable[[Progress], object],
        *,
        title: str | None = None,
        files: list[str] | None = None,
    ) -> None:
        """Do one stage unless it is done; of a group that was not asked for, only make sure that it is done.

        `outputs` belong to the settings, and are put aside when those change; `files` must be whole for the stage to be
        done, and are the outputs if not given.
        """
        files = outputs if files is None else files
        title = title or name.capitalize()
        if self._only is not None and group != self._only:
            self.folder.require(name, settings, f"infalign {group} RECIPE")
            return
        if not self.folder.begin(name, settings, outputs, files):
            self.reporter.say(f"{title}: done before")
            return
        started = time.monotonic()
        try:
            with self.reporter.stage(title) as progress:
                work(progress)
        except Exception as error:
            reason = None if isinstance(error, InfalignError) else storage_failure(error)
            if reason is None:
                raise
            raise StorageError(
                f"the stage {name!r} could not read or write a file ({reason})",
                where=str(self.out),
                hint="Make room or permissions; the same command goes on from here",
            ) from error
        self.folder.finish(name, time.monotonic() - started, files)

    def _print_of(self, stage: str) -> str:
        stamp = self.folder.stamp(stage)
        assert stamp is not None, f"{stage} comes earlier"
        return stamp.print
