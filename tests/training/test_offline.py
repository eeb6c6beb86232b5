"""Offline solvers: right limits, exactly; the same whatever the batches; stopped and gone on; refusals that help."""

import json
from pathlib import Path

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import log_softmax, softmax

from infalign.errors import InputError, RewardError, TrainingError
from infalign.procedures import BestOfN, WorstOfN
from infalign.rewards.score import score_store
from infalign.rewards.source import FunctionReward
from infalign.rollouts.key import RolloutKey
from infalign.rollouts.models import load_policy
from infalign.rollouts.sample import sample
from infalign.rollouts.store import RolloutStore
from infalign.theory.alternatives import tilt_at_kl
from infalign.theory.plan import optimum_at_kl
from infalign.training.fresh import FreshRollouts
from infalign.training.losses import Examples, Regression, WeightedLikelihood
from infalign.training.offline import align_offline, training_arguments
from infalign.training.pool import RolloutPool, log_weights, stored_rollouts
from infalign.training.reward import TransformedReward
from infalign.training.self_consistent import SelfConsistentTransform
from infalign.training.stream import step_order
from infalign.transforms import Exponential, Identity
from tests.training import tabular
from tests.training.enumerable import PROMPTS, TOKENS, Testbed, hashed_reward

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")

KLS = (0.1, 0.5, 2.0)
TRANSFORMS = {"identity": Identity(), "exp+10": Exponential(10.0), "exp-10": Exponential(-10.0)}
PROCEDURES = {"best-of-4": BestOfN(4), "worst-of-4": WorstOfN(4)}


def planned(name: str, kl: float):
    """The transform of that name and the β at which it has this KL in theory."""
    if name in PROCEDURES:
        optimum = optimum_at_kl(PROCEDURES[name], kl)
        return optimum.transform, optimum.beta
    return TRANSFORMS[name], tilt_at_kl(TRANSFORMS[name], kl).beta


# --- the limits, on a table ---


@pytest.fixture(scope="module")
def written_down(tmp_path_factory):
    """A store that holds exactly what the uniform reference draws, with some equal rewards."""
    rewards_PY = np.random.default_rng(3).integers(0, 60, (len(tabular.PROMPTS), len(tabular.RESPONSES))) / 7.0
    return tabular.fitted(tabular.uniform_store(tmp_path_factory.mktemp("uniform"), rewards_PY))[1]


@pytest.mark.parametrize("kl", KLS)
@pytest.mark.parametrize("name", [*TRANSFORMS, *PROCEDURES])
def test_both_solvers_reach_the_optimum(written_down, name, kl):
    """p·exp(Φ_K/β)/Z with the known Z, for every transform and KL; the budget of 0.02 is not touched."""
    transform, beta = planned(name, kl)
    target_PY = tabular.P * np.exp(tabular.per_response(written_down, log_weights(written_down, transform, beta)))
    assert target_PY.sum(axis=1) == pytest.approx(1.0, rel=1e-6), "Z is exact"
    assert tabular.total_variation(target_PY, np.tile(tabular.P, (2, 1))) > 0.1, "the optimum is far from the start"
    for loss in (Regression(transform, beta), WeightedLikelihood(transform, beta)):
        assert tabular.total_variation(tabular.minimise(loss, written_down), target_PY) < 1e-3, loss.label


def test_regression_does_not_care_where_its_rollouts_come_from(written_down):
    """Other weights on the same responses, as rollouts of another policy: the same optimum, but not for likelihood."""
    transform, beta = planned("exp+10", 0.5)
    weights_R = np.random.default_rng(0).uniform(0.1, 5.0, len(written_down))
    reached = {}
    for loss in (Regression(transform, beta), WeightedLikelihood(transform, beta)):
        made = loss.examples(written_down)
        weighted = Examples(made.rollouts_NM, made.targets_N, made.weights_N * weights_R)
        reached[loss.label] = [tabular.minimise(loss, written_down, e) for e in (made, weighted)]
    assert tabular.total_variation(*reached["offline-regression"]) < 1e-3
    assert tabular.total_variation(*reached["weighted-likelihood"]) > 0.05


# --- the trainer ---


@pytest.fixture(scope="module")
def testbed(tmp_path_factory: pytest.TempPathFactory) -> Testbed:
    return Testbed(tmp_path_factory.mktemp("enumerable") / "reference", vocabulary=6)


@pytest.fixture(scope="module")
def stored(testbed, tmp_path_factory):
    """Rollouts of the reference with their rewards, the calibrated reward on them, and the pool."""
    model, tokenizer = load_policy(testbed.reference)
    key = RolloutKey.of(testbed.reference, tokenizer, max_new_tokens=TOKENS, seed=5)
    store = RolloutStore.open(tmp_path_factory.mktemp("stored"), key)
    count, source, ids = 1024, FunctionReward(hashed_reward), [p.id for p in PROMPTS]
    sample(model, tokenizer, PROMPTS, count, store=store)
    score_store(store, source, PROMPTS)
    testbed.calibrator.fit(store.rewards_PK(source.key, ids, count))
    return stored_rollouts(store, PROMPTS, testbed.calibrator, ids)


def train(testbed, out: Path, pool, loss, **changes):
    settings = {"max_new_tokens": TOKENS, "steps": 120, "rollouts_per_step": 128, "learning_rate": 1e-2}
    return align_offline(testbed.reference, out, pool, loss, **{**settings, "save_steps": 10_000, **changes})


def exhaustive(testbed, reward) -> tuple[RolloutPool, np.ndarray]:
    """Every response once, and log π − log p of each at the optimum."""
    parts = [(i, list(tokens), lp) for i, known in enumerate(testbed.responses) for tokens, lp in known.items()]
    logps = np.array([lp for *_, lp in parts])
    ratios = np.concatenate([np.log(testbed.optimum(reward, i)[0]) for i in range(len(PROMPTS))]) - logps
    prompt_R, zeros = np.array([i for i, *_ in parts]), np.zeros(len(parts), int)
    return RolloutPool(tuple(PROMPTS), prompt_R, [t for _, t, _ in parts], logps, zeros * 1.0, zeros, zeros), ratios


@pytest.mark.parametrize("solver", [Regression, WeightedLikelihood])
def test_the_trainer_reaches_the_optimum(testbed, tmp_path, solver):
    """On every response with its probability: no sampling noise, a real model, and the budget of 0.02."""
    loss = solver(Exponential(10.0), 0.25)
    reward = testbed.reward(loss.transform, loss.beta)
    assert min(testbed.distance(testbed.reference, reward)) > 0.3
    pool, ratios = exhaustive(testbed, reward)
    weights = np.exp(pool.ref_logprobs_R + (ratios if solver is WeightedLikelihood else 0.0)) * len(pool) / 2
    examples = Examples(np.arange(len(pool))[:, None], ratios, weights)
    result = train(testbed, tmp_path, pool, loss, examples=examples, rollouts_per_step=len(pool), steps=80)
    assert max(testbed.distance(result.model, reward)) < 0.02


def data_optimum(testbed, pool, loss) -> list[np.ndarray]:
    """Where a table of logits minimises the loss on these very rollouts, for each prompt."""
    made, out = loss.examples(pool), []
    for prompt, known in enumerate(testbed.responses):
        logps, index = np.array(list(known.values())), {tokens: y for y, tokens in enumerate(known)}
        rows = np.flatnonzero(pool.prompt_R == prompt)
        kind = np.array([index[tuple(pool.token_ids[row])] for row in rows])
        count = np.bincount(kind, made.weights_N[rows], len(known))
        target = np.bincount(kind, made.targets_N[rows], len(known)) / np.maximum(
            np.bincount(kind, None, len(known)), 1
        )

        def value(logits, logps=logps, count=count, target=target):
            ratio = log_softmax(logits) - logps
            return count @ ((target - ratio) ** 2 if isinstance(loss, Regression) else -ratio) / count.sum()

        out.append(softmax(minimize(value, logps, method="L-BFGS-B", options={"maxfun": 10**6}).x))
    return out


def test_on_stored_rollouts_it_reaches_what_they_tell(testbed, stored, tmp_path):
    """The optimum on the stored rollouts themselves; how far that is from the true one is sampling noise."""
    reached = {}
    for solver in (Regression, WeightedLikelihood):
        loss = solver(Exponential(10.0), 0.25)
        reward = testbed.reward(loss.transform, loss.beta)
        reached[solver] = data_optimum(testbed, stored, loss)
        noise = [0.5 * np.abs(reached[solver][i] - testbed.optimum(reward, i)[0]).sum() for i in range(2)]
        # Likelihood imitates how often responses were drawn; regression only needs Z, which 1,024 references tell.
        assert max(noise) < (0.05 if solver is Regression else 0.2)
    result = train(testbed, tmp_path, stored, Regression(Exponential(10.0), 0.25))
    assert max(testbed.distances(result.model, reached[Regression])) < 0.04
    assert result.steps[-1].kl == pytest.approx(testbed.kl(result.model), abs=0.2), "128 rollouts, by importance"


def test_mixed_training_ends_near_the_optimum_too(testbed, stored, tmp_path):
    loss = Regression(Exponential(10.0), 0.25)
    reward = testbed.reward(loss.transform, loss.beta)
    fresh = FreshRollouts(reward, every=20, num_prompts=2, num_samples=128)
    result = train(testbed, tmp_path, stored, loss, fresh=fresh, steps=80)
    assert max(testbed.distance(result.model, reward)) < 0.06, "the noise of Z, as above"
    assert result.steps[0].kl is None, "no rollouts of the policy yet"
    # The last round was drawn a few steps before the end: 256 log-ratios.
    assert result.steps[-1].kl == pytest.approx(testbed.kl(result.model), abs=0.2)
    assert not (tmp_path / "fresh").exists()


def optimum_by_enumeration(testbed, n: int, beta: float) -> list[np.ndarray]:
    """The maximum of M2 for Best-of-n over all policies on each prompt's responses; equal rewards count one half.

    R(l + 1) − R(l) = h(F) (v(l + 1) − v(l)) on the responses in order of reward, π ∝ p·exp(R/β), damped.
    """
    policies = []
    for prompt, known in zip(PROMPTS, testbed.responses, strict=True):
        p_Y = np.exp(list(known.values()))
        order = np.argsort(testbed.rewards(prompt, known))
        above = np.concatenate([[0.0], np.cumsum(p_Y[order])]) ** n
        value = (above[1:] + above[:-1]) / 2
        tilt = np.zeros(len(p_Y))
        for _ in range(2000):
            policy = softmax(np.log(p_Y[order]) + tilt)
            steps = n * np.cumsum(policy)[:-1] ** (n - 1) * np.diff(value)
            tilt += 0.02 * (np.concatenate([[0.0], np.cumsum(steps)]) / beta - tilt)
        policies.append(policy[np.argsort(order)])
    return policies


@pytest.mark.slow
def test_mixed_training_lets_the_self_consistent_transform_follow(testbed, stored, tmp_path):
    """It ends near the best of all policies, known by enumeration (0.05 and 0.10 were seen), though rewards tie."""
    procedure, beta = BestOfN(4), 0.2166
    target = optimum_by_enumeration(testbed, procedure.n, beta)
    assert min(testbed.distances(testbed.reference, target)) > 0.2
    transform = SelfConsistentTransform(procedure, memory=0.5)
    fresh = FreshRollouts(testbed.reward(transform, beta), every=10, num_prompts=2, num_samples=128)
    result = train(testbed, tmp_path, stored, Regression(transform, beta), fresh=fresh, steps=240)
    assert max(testbed.distances(result.model, target)) < 0.12, "the noise of Z and of each update's 256 rollouts"


def weights_of(folder: Path) -> np.ndarray:
    model, _ = load_policy(folder)
    return np.concatenate([p.detach().numpy().ravel() for p in model.parameters()])


def test_batches_change_nothing_but_rounding(testbed, stored, tmp_path):
    """Gradient accumulation, padding side and the order of a step's examples."""
    loss = Regression(Identity(), 0.25)
    short = {"steps": 4, "rollouts_per_step": 64, "learning_rate": 1e-3}
    plain = weights_of(train(testbed, tmp_path / "plain", stored, loss, **short).model)
    start = weights_of(testbed.reference)
    assert np.abs(plain - start).max() > 1e-3
    accumulated = {"gradient_accumulation_steps": 4}
    other = train(testbed, tmp_path / "accumulated", stored, loss, trainer=accumulated, **short)
    assert weights_of(other.model) == pytest.approx(plain, abs=2e-5)
    padded = train(testbed, tmp_path / "right", stored, loss, padding_side="right", **short)
    assert weights_of(padded.model) == pytest.approx(plain, abs=2e-5)


def test_the_order_within_a_step_changes_nothing_but_rounding(testbed, stored, tmp_path):
    """The whole pool in one step: another seed is another order of the same examples."""
    loss = WeightedLikelihood(Identity(), 0.25)
    few = Examples(np.arange(0, 2048, 16)[:, None], np.zeros(128), np.random.default_rng(0).uniform(0.5, 2.0, 128))
    once = {"steps": 3, "rollouts_per_step": 128, "learning_rate": 1e-3, "examples": few}
    first = train(testbed, tmp_path / "one", stored, loss, seed=1, **once)
    second = train(testbed, tmp_path / "two", stored, loss, seed=2, **once)
    assert weights_of(first.model) == pytest.approx(weights_of(second.model), abs=2e-5)


def test_every_example_comes_once_before_any_comes_again():
    lengths = np.random.default_rng(0).integers(3, 30, 40)
    order = step_order(lengths, steps=25, per_step=8, seed=0)
    for epoch in order.reshape(5, 40):
        assert sorted(epoch) == list(range(40))
    assert all((np.diff(lengths[step]) >= 0).all() for step in order)
    assert (order != step_order(lengths, 25, 8, seed=1)).any()


class StoppedError(Exception):
    pass


@pytest.mark.parametrize("kind", ["stored", "mixed", "mixed, self-consistent"])
def test_a_stopped_training_goes_on_exactly_as_if_it_had_not_stopped(testbed, stored, tmp_path, kind):
    def stop_at_seven(done: int, total: int, text: str) -> None:
        if done == 7:
            raise StoppedError

    def run(folder: str, **more):
        transform = SelfConsistentTransform(BestOfN(4)) if kind == "mixed, self-consistent" else Identity()
        loss = Regression(transform, 0.25)
        fresh = FreshRollouts(testbed.reward(transform, 0.25), every=2, num_prompts=1, num_samples=8)
        return train(
            testbed,
            tmp_path / folder,
            stored,
            loss,
            steps=10,
            rollouts_per_step=16,
            learning_rate=1e-3,
            save_steps=3,
            kl_budget=0.01,
            fresh=None if kind == "stored" else fresh,
            **more,
        )

    whole = run("whole")
    with pytest.raises(StoppedError):
        run("parts", progress=stop_at_seven)
    parts = run("parts")
    assert [s.step for s in parts.steps] == list(range(1, 11))
    assert parts == run("parts"), "a finished training is read, not repeated"
    assert parts.steps == whole.steps
    assert (parts.model / "model.safetensors").read_bytes() == (whole.model / "model.safetensors").read_bytes()
    assert not (tmp_path / "parts" / "checkpoints").exists(), "checkpoints go when the model is saved"
    written = [json.loads(line) for line in (tmp_path / "parts" / "steps.jsonl").read_text().splitlines()]
    assert [row["step"] for row in written] == list(range(1, 11))


def test_it_lands_on_the_budget_with_an_adapter_too(testbed, stored, tmp_path):
    lora = {"r": 8, "target_modules": "all-linear"}
    result = train(
        testbed, tmp_path, stored, Regression(Identity(), 0.25), steps=40, kl_budget=0.3, lora=lora, learning_rate=1e-2
    )
    assert (result.model / "adapter_config.json").exists()
    assert not (result.model / "model.safetensors").exists()
    assert result.landing is not None
    # Against enumeration, not against what it measured itself: 1,024 rollouts, seeded.
    assert testbed.kl(result.model) == pytest.approx(0.3, rel=0.1)


def test_failures_say_what_to_change(testbed, stored, tmp_path):
    loss = Regression(Identity(), 0.25)
    short = {"steps": 3, "rollouts_per_step": 16}
    with pytest.raises(TrainingError, match=r"not finite.*learning_rate"):
        train(testbed, tmp_path / "a", stored, loss, **{**short, "steps": 30, "learning_rate": 1e30})
    fresh = FreshRollouts(testbed.reward(Identity(), 0.25), every=2, num_prompts=1, num_samples=8)
    with pytest.raises(InputError, match="needs draws of the reference"):
        train(testbed, tmp_path / "b", stored, WeightedLikelihood(Identity(), 0.25), fresh=fresh, **short)
    with pytest.raises(InputError, match=r"training\.lora"):
        train(testbed, tmp_path / "c", stored, loss, lora={"target_modules": ["nowhere"]}, **short)
    with pytest.raises(InputError, match="at least 2"):
        FreshRollouts(testbed.reward(Identity(), 0.25), every=1, num_prompts=1, num_samples=8)


def test_a_reward_that_fails_on_fresh_rollouts_stops_with_its_reason(testbed, stored, tmp_path):
    def sometimes_nothing(prompts, completions, **_):
        return [None if not text else 1.0 for text in completions]

    reward = TransformedReward(
        FunctionReward(sometimes_nothing), testbed.calibrator, [p.id for p in PROMPTS], Identity(), 0.25
    )
    fresh = FreshRollouts(reward, every=2, num_prompts=2, num_samples=64)
    with pytest.raises(RewardError, match="no finite reward"):
        train(testbed, tmp_path, stored, Regression(Identity(), 0.25), fresh=fresh, steps=4, rollouts_per_step=16)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lerning_rate": 1}, "lerning_rate"),
        ({"max_steps": 3}, r"Set training\.steps instead"),
        ({"logging_steps": 10}, "relies on logging_steps=1"),
        ({"gradient_accumulation_steps": 0}, "whole number"),
        ({"gradient_accumulation_steps": 3}, "do not divide"),
    ],
)
def test_settings_are_checked(tmp_path, fields, message):
    with pytest.raises(InputError, match=message):
        training_arguments(
            tmp_path, steps=3, examples_per_step=16, learning_rate=1e-3, seed=0, save_steps=3, overrides=fields
        )


def test_a_kept_checkpoint_is_a_model_with_its_tokenizer(testbed, stored, tmp_path):
    loss = Regression(Identity(), 0.25)
    train(testbed, tmp_path, stored, loss, steps=2, rollouts_per_step=16, save_steps=1, keep_checkpoints=True)
    model, tokenizer = load_policy(tmp_path / "checkpoints" / "checkpoint-1")
    assert tokenizer.get_vocab() == testbed.tokenizer.get_vocab()
    assert model.config.vocab_size == load_policy(testbed.reference)[0].config.vocab_size
