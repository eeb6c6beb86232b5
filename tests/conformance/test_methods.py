"""One table for all methods: what every way of training must satisfy."""

from __future__ import annotations

import inspect
import json
import pickle
import pkgutil

import numpy as np
import pytest
import torch

from infalign.calibration.calibrator import RewardCalibrator
from infalign.calibration.combined import CombinedCalibrator
from infalign.errors import InputError
from infalign.procedures import BestOfN, WorstOfN
from infalign.rewards.source import FunctionReward
from infalign.rollouts.prompts import Prompt
from infalign.run.recipe import Training
from infalign.training import methods
from infalign.training.methods import comparator_from_dict, comparator_kinds, method_from_dict, transform_method
from infalign.training.methods.base import Comparator
from infalign.training.pool import RolloutPool
from infalign.transforms import Exponential, Identity, Log

SOLVERS = ["online", "offline-regression", "weighted-likelihood", "mixed"]
KL = 0.3
REWARDS_PK = np.random.default_rng(0).normal(size=(3, 16)).round(1)  # some are equal
IDS = ["p", "q", "r"]


def lengths(prompts, completions):
    return [float(len(text)) for text in completions]


TRANSFORMS = [
    transform_method(name, transform, procedure, KL)[0]
    for name, transform, procedure in [
        ("identity", Identity(), BestOfN(4)),
        ("log", Log(), BestOfN(4)),
        ("exponential+10", Exponential(10.0), BestOfN(4)),
        ("optimal", None, BestOfN(4)),
        ("optimal", None, WorstOfN(4)),
        ("self-consistent", None, BestOfN(4)),
    ]
]
METHODS = [*TRANSFORMS, *(comparator_from_dict({"baseline": kind}) for kind in comparator_kinds())]
every = pytest.mark.parametrize("method", METHODS, ids=lambda method: f"{method.name}")


def references():
    return RewardCalibrator().fit(REWARDS_PK)


def pool() -> RolloutPool:
    """The references themselves, each ranked among the others of its prompt."""
    ranks_R, ties_R = references().reference_ranks_and_ties()
    row_R = np.repeat(np.arange(3), 16)
    counts = {row: references().level_counts(row) for row in range(3)}
    return RolloutPool(
        tuple(map(Prompt, IDS)), row_R, [[1]] * 48, np.zeros(48), ranks_R, ties_R, np.full(48, 15), row_R, counts
    )


def solvers_of(method):
    """What can train it, by the names that a recipe has for solvers."""
    if isinstance(method, Comparator):
        return ["online"] if method.online else ["offline-regression"]
    return list(getattr(method, "SOLVERS", SOLVERS))


def test_every_file_of_the_folder_is_a_method():
    shared = {"base", "calibrated", "self_consistent"}
    files = {one.name for one in pkgutil.iter_modules(methods.__path__) if not one.name.startswith("_")} - shared
    assert files == {kind.replace("-", "_") for kind in comparator_kinds()}


@every
def test_its_name_can_be_a_folder_and_its_class_says_what_it_is(method):
    assert method.name.replace("-", "").replace("+", "").replace(".", "").isalnum()
    assert method.label
    assert inspect.getdoc(type(method))


@every
def test_it_goes_through_a_plan_and_to_other_processes(method):
    entry = json.loads(json.dumps({"name": method.name, **method.to_dict(), "beta": 1.0}))
    for copy in (method_from_dict(entry), pickle.loads(pickle.dumps(method))):
        assert type(copy) is type(method)
        assert (copy.name, copy.described, copy.num_ref) == (method.name, method.described, method.num_ref)


@every
def test_its_beta_is_positive_and_smaller_for_more_kl_if_it_goes_by_the_kl(method):
    small, large = (method.beta_for_kl(kl, references()) for kl in (KL, 2 * KL))
    assert 0 < large <= small < np.inf


@every
@pytest.mark.parametrize("solver", SOLVERS)
def test_what_decides_its_result_is_settings_of_training(method, solver):
    used = method.deciding_settings(solver)
    assert used < set(Training.model_fields)
    assert {"steps", "learning_rate", "prompts_per_step", "num_generations"} <= used
    assert ("rloo" in used) == (method.solved_by(solver) == "online")
    assert ("offline" in used) != ("rloo" in used)


def test_every_setting_of_training_decides_something():
    """Or is known not to: a new one must be put somewhere."""
    used = set().union(*(method.deciding_settings(solver) for method in METHODS for solver in SOLVERS))
    assert set(Training.model_fields) - used == {"save_steps", "mixture"}


@every
def test_it_is_a_reward_or_a_loss_where_its_solver_needs_one(method):
    for solver in solvers_of(method):
        if method.solved_by(solver) == "online":
            reward = method.reward(FunctionReward(lengths), references(), IDS, 0.5, procedure=BestOfN(2))
            rewards = np.array([-3.0, -0.1, 0.0, 0.4, 3.0])
            paid = reward.pay(rewards, ["p"] * 5)
            assert (np.diff(paid.nats_B) >= 0).all(), "a better response is not paid less"
            assert paid.nats_B[-1] > paid.nats_B[0]
            assert np.isfinite(paid.log_partition_B).all()
            assert reward.__name__.startswith(method.label)
        else:
            loss = method.loss(method.beta_for_kl(KL, references()), solver)
            made = loss.examples(pool())
            assert made.rollouts_NM.shape[1] == method.rollouts_per_example
            assert len(made.targets_N) == len(made.weights_N) == len(made.rollouts_NM)
            ratios = torch.zeros(made.rollouts_NM.shape, dtype=torch.float64, requires_grad=True)
            value = (loss(ratios, torch.tensor(made.targets_N)) * torch.tensor(made.weights_N)).mean()
            value.backward()
            assert torch.isfinite(value)
            assert ratios.grad is not None
            # At the reference the best response is pushed up against the worst.
            best, worst = (pool().ranks_R.argmax(), pool().ranks_R.argmin()) if ratios.shape[1] == 1 else (0, 0)
            assert ratios.grad[best, 0] < ratios.grad[worst, -1]


@every
def test_what_it_is_not_it_says(method):
    online = {method.solved_by(solver) == "online" for solver in solvers_of(method)}
    if True not in online:
        with pytest.raises(InputError, match=rf"{method.name} is a loss on stored rollouts, not a reward.*raw"):
            method.reward(FunctionReward(lengths), references(), IDS, 0.5)
    if False not in online:
        with pytest.raises(InputError, match=rf"{method.name} is a reward for online training, not a loss"):
            method.loss(0.5, "offline-regression")


@every
def test_it_needs_a_number_of_references(method):
    method.require_references(method.num_ref)
    with pytest.raises(InputError, match=f"there are only {method.num_ref - 1}"):
        method.require_references(method.num_ref - 1)


@every
def test_several_rewards(method):
    combined = CombinedCalibrator([1.0, 1.0]).fit(np.stack([REWARDS_PK, -REWARDS_PK], axis=-1))
    if method.single_reward:
        with pytest.raises(InputError, match="no common scale"):
            method.reward(FunctionReward(lengths), combined, IDS, 0.5)
    elif "online" in solvers_of(method):
        reward = method.reward(FunctionReward(lengths), combined, IDS, 0.5)
        assert np.isfinite(reward.tilt(np.array([[0.0, 1.0]]), ["p"])).all()


@pytest.mark.parametrize("kind", comparator_kinds())
def test_every_setting_of_a_comparator_is_checked_and_used(kind):
    given = {"beta": 0.25, "n": 3, "quantile": 0.5, "alpha": 0.25}
    plain = comparator_from_dict({"baseline": kind})
    assert plain.name == kind
    for name in plain.SETTINGS:
        method = comparator_from_dict({"baseline": kind, name: given[name]})
        assert method.settings == plain.settings | {name: given[name]}
        assert method.name == f"{kind}-{name}{given[name]:g}"
        for bad in (-1, "much", True, None, float("nan"), float("inf")):
            with pytest.raises(InputError, match=f"{name} of the baseline {kind} must be"):
                comparator_from_dict({"baseline": kind, name: bad})
    with pytest.raises(InputError, match="has no setting 'colour'"):
        comparator_from_dict({"baseline": kind, "colour": 1})
