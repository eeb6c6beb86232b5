"""Evaluate any models against a reference: checked first, then drawn, scored and measured, nothing twice."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from infalign._io.files import refuse_links_out, write_json, write_text
from infalign._io.progress import Progress
from infalign._io.wording import counted, distinct
from infalign.errors import InputError
from infalign.evaluation.compare import compare_pairs
from infalign.evaluation.fresh import exact_kls, measure_store, with_record
from infalign.evaluation.predictability import with_predictability
from infalign.evaluation.record import FILE, Evaluation
from infalign.evaluation.results import MethodResult
from infalign.procedures import InferenceProcedure
from infalign.report.build import build_report
from infalign.rewards.score import score_store
from infalign.rewards.source import RewardSource
from infalign.rollouts.key import RolloutKey
from infalign.rollouts.models import load_tokenizer
from infalign.rollouts.opening import PolicyOpener
from infalign.rollouts.policy import Policy
from infalign.rollouts.prompts import PromptSet
from infalign.rollouts.rendering import moment_now
from infalign.rollouts.store import RolloutStore
from infalign.rollouts.tokens import excerpt, prompt_token_ids
from infalign.run.checks import check_writable
from infalign.run.folder import versions
from infalign.run.stages.run import moment_of, prompt_lines, read_prompts, run_of


class Reporter(Protocol):
    """Tells the user what is going on."""

    def stage(self, title: str) -> AbstractContextManager[Progress]:
        """A stage in progress."""
        ...


@dataclass(frozen=True)
class Candidate:
    """A model to evaluate.

    Attributes:
        label: Its name in tables.
        model: Folder (full weights or adapter) or hub name.
        series: What the candidates of one curve share, such as the checkpoints of one training.
        step: Training step, of a checkpoint.
    """

    label: str
    model: str
    series: str | None = None
    step: int | None = None


@dataclass(frozen=True)
class Job:
    """What to evaluate, on what, and how.

    Attributes:
        candidates: The models.
        reference: What they are measured against: folder or hub name.
        prompts: Held-out prompts.
        reward: The reward that procedures choose by.
        procedures: Procedures, each with n at most `num_samples`; the first is the one in use.
        out: Folder of the evaluation.
        gold: Further rewards that judge, by name.
        num_samples: Fresh rollouts of each prompt, from every model.
        max_new_tokens: Cap on a response.
        seed: Seed of the reference's rollouts; each model's own follows from it and from its weights.
        confidence: Level of every interval.
        batch_size: Rollouts drawn at the same time.
        run: Folder of a run whose rollouts serve where they fit.
        allow_overlap: Evaluate on prompts that a model was trained on; the report then says so.
        trust_remote_code: Run Python code that comes with a model.
        allow_pickle: Also accept weights that are not safetensors.
    """

    candidates: Sequence[Candidate]
    reference: str
    prompts: PromptSet
    reward: RewardSource
    procedures: Sequence[InferenceProcedure]
    out: Path
    gold: Mapping[str, RewardSource] = field(default_factory=dict)
    num_samples: int = 32
    max_new_tokens: int = 128
    seed: int = 0
    confidence: float = 0.95
    batch_size: int | None = None
    run: Path | None = None
    allow_overlap: bool = False
    trust_remote_code: bool = False
    allow_pickle: bool = False


def evaluate_models(job: Job, reporter: Reporter) -> Evaluation:
    """Draw, score and measure; writes `evaluation.json` and `report.html`. Called again, it goes on where it stopped.

    Args:
        job: What to do.
        reporter: Told what is going on.

    Raises:
        InputError: If a check fails; nothing was computed then.
        StorageError: If the folder cannot be written.
    """
    moment = _moment(job)
    job = replace(job, prompts=job.prompts.rendered_at(moment))
    for source in (job.reward, *job.gold.values()):
        source.render_at(moment)
    return _Evaluator(job, reporter).run(check_job(job))


@dataclass(frozen=True)
class Checked:
    """What the checks of a job found.

    Attributes:
        warnings: What a reader must know before the numbers, in sentences.
        held_out: Whether no prompt is known to have been trained on by a model.
    """

    warnings: list[str]
    held_out: bool


def check_job(job: Job) -> Checked:
    """Refuse what could only fail later, or would give numbers that mean something else than they seem.

    Returns:
        What they found.

    Raises:
        InputError: If there are too few samples for a procedure, labels repeat, a gold reward is the reward itself,
            tokenizers differ, prompts were trained on, or `job.out` is the folder of a run.
        StorageError: If the folder cannot be written.
    """
    check_writable(job.out)
    refuse_links_out(job.out)
    if (job.out / "run.json").is_file():
        raise InputError(
            "this is the folder of a run, whose prompts, results and report would be overwritten",
            where=f"--out {job.out}",
            hint="Choose another folder",
        )
    labels = [candidate.label for candidate in job.candidates]
    for label in labels:
        if labels.count(label) > 1 or label == "reference":
            raise InputError(
                f"two models would be called {label}",
                where="--model",
                hint="Write --model NAME=FOLDER to tell them apart",
            )
    for index, procedure in enumerate(job.procedures):
        if procedure.label in [earlier.label for earlier in job.procedures[:index]]:
            raise InputError(f"{procedure.label} is named twice", where="--procedures", hint="Name each procedure once")
        try:
            for _, component in procedure.components:
                component.selection_weights(job.num_samples)
        except InputError as error:
            raise InputError(
                f"{procedure.label} needs {procedure.n or 'more'} samples of each prompt, and there are to be "
                f"{job.num_samples}",
                where="--samples",
                hint="Draw more, or leave the procedure out",
            ) from error
    for name, source in job.gold.items():
        if name == "reward":
            raise InputError("this name is the reward's own", where=f"--gold {name}", hint="Write --gold NAME=REWARD")
        if source.key == job.reward.key:
            raise InputError("this is the reward itself", where=f"--gold {name}", hint="Give another judge")
    _check_tokenizers(job)
    return _check_overlap(job)


def _check_tokenizers(job: Job) -> None:
    """The KL compares probabilities of the same tokens after the same prompts."""
    reference = load_tokenizer(job.reference, trust_remote_code=job.trust_remote_code)
    wanted = prompt_token_ids(reference, job.prompts)
    for candidate in job.candidates:
        tokenizer = load_tokenizer(candidate.model, trust_remote_code=job.trust_remote_code)
        if tokenizer.get_vocab() != reference.get_vocab():
            different = "their vocabularies differ"
        elif tokenizer.eos_token_id != reference.eos_token_id:
            different = f"one ends responses with {tokenizer.eos_token!r}, the other with {reference.eos_token!r}"
        elif prompt_token_ids(tokenizer, job.prompts) != wanted:
            different = "they write the same prompt in different tokens; perhaps their chat templates differ"
        else:
            continue
        raise InputError(
            f"{candidate.label} and the reference have different tokenizers ({different}), so there is no KL "
            "between them",
            where="--reference",
            hint="Give the model that this one was trained from",
        )


def _check_overlap(job: Job) -> Checked:
    """Prompts that a model has seen in training flatter it."""
    warnings: list[str] = []
    held_out = True
    ids = job.prompts.ids
    unknown: list[str] = []
    runs: dict[Path, list[str]] = {}
    for candidate in job.candidates:
        run = run_of(candidate.model) or job.run
        if run is None:
            unknown.append(candidate.label)
        else:
            runs.setdefault(run, []).append(candidate.label)
    for run, labels in runs.items():
        seen = {prompt.id for prompt in read_prompts(run, "train")}
        overlap = [prompt for prompt in job.prompts if prompt.id in seen]
        if overlap:
            held_out = False
            who = ", ".join(labels)
            were = "was" if len(overlap) == 1 else "were"
            told = f"{len(overlap)} of {counted(len(ids), 'prompt')} {were} calibrated or trained on by {who}"
            if not job.allow_overlap:
                raise InputError(
                    f"{told}, the first is {excerpt(overlap[0].prompt)}",
                    where="--prompts",
                    hint="Give held-out prompts, or --allow-overlap for numbers that are marked as such",
                )
            warnings.append(f"{told}: the numbers flatter them.")
    if unknown:
        warnings.append(
            f"It is not known which prompts {', '.join(unknown)} was trained on; make sure that none of these is among "
            "them."
        )
    return Checked(warnings, held_out)


class _Evaluator:
    """One job at work."""

    def __init__(self, job: Job, reporter: Reporter) -> None:
        self.job = job
        self.reporter = reporter
        self._used: set[Path] = set()

    def run(self, checked: Checked) -> Evaluation:
        """All of it."""
        job = self.job
        write_text(job.out / "prompts" / "evaluation.jsonl", prompt_lines(job.prompts))
        reference = self._draw("reference", job.reference, job.seed)
        results: list[MethodResult] = []
        stores = {"reference": reference}
        for candidate in job.candidates:
            store = stores[candidate.label] = self._draw(candidate.label, candidate.model, None)
            results.append(self._measure(candidate, store, reference))
        results, predictability = with_predictability(results, job.procedures)
        first, *others = results
        evaluation = Evaluation(
            name=job.out.resolve().name,
            procedure=job.procedures[0].to_dict(),
            kl_budget=None,
            reference=reference.key.model,
            reward=job.reward.key,
            gold={name: source.key for name, source in job.gold.items()},
            max_new_tokens=job.max_new_tokens,
            stores={label: os.path.relpath(store.path, job.out) for label, store in stores.items()},
            results=results,
            comparisons=[one.to_dict() for one in compare_pairs([(other, first) for other in others])],
            baseline=first.label if others else None,
            warnings=checked.warnings,
            held_out=checked.held_out,
            settings=self._settings(),
            versions=versions(),
            predictability=predictability,
        )
        write_json(job.out / FILE, evaluation.to_dict())
        with self.reporter.stage("Write the report"):
            build_report(job.out)
        return evaluation

    def _draw(self, label: str, model: str, seed: int | None) -> RolloutStore:
        """Scored rollouts of one model: those of the run where they fit, else drawn as far as they are missing."""
        job = self.job
        tokenizer = load_tokenizer(model, trust_remote_code=job.trust_remote_code)
        key = RolloutKey.of(model, tokenizer, max_new_tokens=job.max_new_tokens, seed=0)
        # A seed of its own, whatever the order in which models are named: their rollouts are independent.
        drawn = hashlib.sha256(key.model.encode()).digest()
        own = job.seed + 1 + int.from_bytes(drawn[:3], "big")
        key = RolloutKey(**{**key.to_dict(), "seed": own if seed is None else seed})
        store = self._of_the_run(key)
        if store is None:
            digest = hashlib.sha256(json.dumps(key.to_dict(), sort_keys=True).encode()).hexdigest()[:8]
            name = f"{re.sub(r'[^A-Za-z0-9._-]+', '-', label)}-{digest}"
            store = RolloutStore.open(job.out / "rollouts" / name, key)
            if self._missing(store):
                with self.reporter.stage(f"Fresh rollouts ({label})") as progress:
                    self._opener().open(model).draw(
                        list(job.prompts), job.num_samples, store=store, batch_size=job.batch_size, progress=progress
                    )
        self._used.add(store.path)
        for name, source in {"reward": job.reward, **job.gold}.items():
            with self.reporter.stage(f"Score {label} ({name})") as progress:
                score_store(store, source, job.prompts, progress=progress, retry_unscored=True)
        return store

    def _of_the_run(self, key: RolloutKey) -> RolloutStore | None:
        """A store of the run that holds what this key would draw, but for the seed."""
        if self.job.run is None:
            return None
        for folder in sorted((self.job.run / "rollouts").glob("evaluation-*")):
            store = RolloutStore.open(folder)
            alike = {**store.key.to_dict(), "seed": 0} == {**key.to_dict(), "seed": 0}
            # The rollouts that combine several rewards must not judge as well.
            judged = folder.name != "evaluation-calibration"
            if alike and judged and store.path not in self._used and not self._missing(store):
                return store
        return None

    def _missing(self, store: RolloutStore) -> bool:
        wanted, present = set(range(self.job.num_samples)), store.present()
        return any(not wanted <= present.get(prompt_id, set()) for prompt_id in self.job.prompts.ids)

    def _measure(self, candidate: Candidate, store: RolloutStore, reference: RolloutStore) -> MethodResult:
        job = self.job

        def load() -> tuple[Policy, Policy]:
            opener = self._opener()
            return opener.open(candidate.model), opener.open(job.reference)

        with self.reporter.stage(f"Measure {candidate.label}") as progress:
            kls_PG = exact_kls(store, job.prompts, job.num_samples, reference.key.model, load, progress, reference)
            result = measure_store(
                *(candidate.label, store, reference, kls_PG, job.prompts, job.procedures),
                reward_key=job.reward.key,
                reward=_reward_name(job),
                gold={name: source.key for name, source in job.gold.items()},
                confidence=job.confidence,
                series=candidate.series,
                step=candidate.step,
            )
            return with_record(result, candidate.model, store)

    def _opener(self) -> PolicyOpener:
        job = self.job
        return PolicyOpener(trust_remote_code=job.trust_remote_code, allow_pickle=job.allow_pickle)

    def _settings(self) -> dict[str, Any]:
        job = self.job
        return {
            "models": {candidate.label: candidate.model for candidate in job.candidates},
            "reference": job.reference,
            "reward": _reward_name(job),
            "gold": {name: str(source) for name, source in job.gold.items()},
            "prompts": len(job.prompts),
            "samples": job.num_samples,
            "max_new_tokens": job.max_new_tokens,
            "seed": job.seed,
            "confidence": job.confidence,
        }


def _moment(job: Job) -> str:
    """When chat prompts are rendered: as in the run that a model comes from, else as in an earlier try, else now."""
    runs = [job.run, *(run_of(candidate.model) for candidate in job.candidates)]
    found = [moment_of(folder) for folder in (*runs, job.out) if folder is not None]
    return next((moment for moment in found if moment is not None), None) or moment_now()


def _reward_name(job: Job) -> str:
    """What to call the reward beside the gold ones, whose names are the user's own."""
    return distinct([*job.gold, str(job.reward)])[-1]


def candidates_of_run(run: Path, *, checkpoints: bool) -> list[Candidate]:
    """The aligned models of a run, and their kept checkpoints.

    Args:
        run: The run folder.
        checkpoints: Whether to give checkpoints too, each before the model it led to.

    Raises:
        InputError: If there is no model, or no checkpoint where they are asked for.
    """
    found: list[Candidate] = []
    kept = 0
    for folder in sorted((run / "policies").glob("*")):
        name = folder.name
        if checkpoints:
            kept_here = (folder / "checkpoints").glob("checkpoint-*")
            numbered = {path.name.rpartition("-")[2]: path for path in kept_here}
            steps = {int(number): path for number, path in numbered.items() if number.isdecimal()}
            kept += len(steps)
            found += [Candidate(f"{name} step {step}", str(steps[step]), name, step) for step in sorted(steps)]
        if (folder / "model").is_dir():
            found.append(Candidate(name, str(folder / "model"), name if checkpoints else None))
    if checkpoints and not kept:
        raise InputError(
            "no checkpoint of this run is kept",
            where=str(run),
            hint="A training removes them when it ends, unless the recipe says training.keep_checkpoints: true",
        )
    if not found:
        raise InputError("there is no aligned model in this run", where=str(run), hint="Train first: `infalign train`")
    return found
