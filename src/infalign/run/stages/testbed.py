"""The testbed, for a recipe that brings no models."""

from __future__ import annotations

from dataclasses import replace

from infalign._io.progress import Progress
from infalign._io.wording import counted
from infalign.run.inputs import testbed_text
from infalign.run.stages.run import Run
from infalign.run.testbed.models import DOCSTRING_REFERENCE, DOCSTRING_REWARD, train_reference, train_reward_model


def make_reference(run: Run, progress: Progress) -> None:
    """A tiny reference policy, trained from scratch."""
    assert run.recipe.testbed is not None, "the caller checked"
    result = train_reference(
        testbed_text(run.recipe)[0],
        run.out / "models" / "reference",
        spec=replace(DOCSTRING_REFERENCE, **run.recipe.testbed.reference.model_dump(exclude_none=True)),
        seed=run.recipe.seed,
        progress=progress,
    )
    told = f"{counted(result.parameters, 'parameter')}, {counted(result.train_examples, 'example')}"
    if result.held_out_perplexity is not None:
        told += f", held-out perplexity {result.held_out_perplexity:.1f} per token"
    run.say(f"  {told}")


def make_reward_model(run: Run, progress: Progress) -> None:
    """A tiny reward model."""
    assert run.recipe.testbed is not None, "the caller checked"
    result = train_reward_model(
        testbed_text(run.recipe)[1],
        run.reference,
        run.out / "models" / "reward",
        spec=replace(DOCSTRING_REWARD, **run.recipe.testbed.reward_model.model_dump(exclude_none=True)),
        seed=run.recipe.seed,
        progress=progress,
    )
    told = f"{counted(result.train_pairs, 'pair')} ({result.truncated} truncated)"
    if result.held_out_accuracy is not None:
        told += f", held-out accuracy {result.held_out_accuracy:.3f}"
    run.say(f"  {told}")
