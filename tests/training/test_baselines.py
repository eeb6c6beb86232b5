"""Baselines converge to their own closed forms, worked out by other means."""

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import log_softmax, logsumexp, softmax

from infalign.calibration.calibrator import RewardCalibrator
from infalign.errors import InputError
from infalign.rewards.source import FunctionReward
from infalign.training.losses import Examples
from infalign.training.methods._pairs import best_and_worst
from infalign.training.methods._utility import beta_for_kl
from infalign.training.methods.bonbon import BoNBoN
from infalign.training.methods.dpo import DPO
from infalign.training.methods.ipo import IPO
from infalign.training.methods.log_sigmoid import LogSigmoidMethod
from infalign.training.methods.qrpo import QRPO
from infalign.training.methods.raw import RawMethod
from infalign.training.methods.standardised import StandardisedMethod, standardised
from infalign.training.online import align
from tests.training import tabular
from tests.training.enumerable import PROMPTS, TOKENS, Testbed, hashed_reward

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")

REFERENCES = [[1.0, 2.0, 6.0, 3.0], [0.0, 10.0, 20.0, 30.0]]
IDS = ["p", "q"]


def make(kind, beta=0.5, **more):
    return kind(**more).reward(FunctionReward(hashed_reward), RewardCalibrator().fit(REFERENCES), IDS, beta)


# --- rewards ---


def test_what_they_maximise_by_hand():
    rewards = np.array([1.0, 3.0, 20.0])
    assert make(RawMethod).tilt(rewards, ["p", "p", "q"]).tolist() == [2.0, 6.0, 40.0]
    # Group p: mean 2, standard deviation √2; q is alone, and no better than its group.
    expected = np.array([-1.0, 1.0, 0.0]) / (np.sqrt(2.0) + 1e-4) / 0.5
    assert make(StandardisedMethod).tilt(rewards, ["p", "p", "q"]) == pytest.approx(expected)
    centred = make(LogSigmoidMethod, quantile=0.5).tilt(rewards, ["p", "p", "q"])
    assert centred == pytest.approx(-np.log1p(np.exp([2.5 - 1.0, 2.5 - 3.0, 15.0 - 20.0])) / 0.5)


def test_standardising_takes_out_scale_and_offset_of_each_prompt():
    rng = np.random.default_rng(0)
    rewards, ids = rng.normal(size=32), IDS * 16
    changed = rewards * np.tile([3.0, 0.1], 16) + np.tile([7.0, -2.0], 16)
    rows = make(StandardisedMethod).rows(ids)
    expected = standardised(rewards, rows, epsilon=0.0)
    assert standardised(changed, rows, epsilon=0.0) == pytest.approx(expected)
    assert np.isfinite(make(StandardisedMethod).tilt(np.ones(4), ["p"] * 4)).all(), "a group of equal rewards"


@pytest.mark.parametrize("kind", [RawMethod, StandardisedMethod, LogSigmoidMethod])
def test_the_planned_beta_spends_the_kl_on_the_references(kind):
    reward = make(kind)
    reward.beta = beta_for_kl(reward.transform, 0.3)
    kls = [
        softmax(u / reward.beta) @ (log_softmax(u / reward.beta) + np.log(4)) for u in reward.transform.of_references()
    ]
    assert np.mean(kls) == pytest.approx(0.3, rel=1e-5)
    log_z = [logsumexp(u / reward.beta) - np.log(4) for u in reward.transform.of_references()]
    assert reward.log_normalizer(["q", "p"]) == pytest.approx(log_z[::-1])
    with pytest.raises(InputError, match=r"can spend 1\.39 nats.*num_ref"):
        beta_for_kl(make(kind).transform, 1.5)


def test_a_quantile_is_a_number_between_0_and_1():
    with pytest.raises(InputError, match="quantile"):
        make(LogSigmoidMethod, quantile=85)


@pytest.fixture(scope="module")
def testbed(tmp_path_factory):
    return Testbed(tmp_path_factory.mktemp("enumerable") / "reference", vocabulary=6)


def online(testbed, out, kind, beta):
    """The policy that the online solver ends at."""
    ids = [prompt.id for prompt in PROMPTS]
    reward = kind().reward(FunctionReward(hashed_reward), testbed.calibrator, ids, beta)
    return align(
        testbed.reference, out, PROMPTS, reward, max_new_tokens=TOKENS, steps=150, prompts_per_step=2,
        num_generations=256, learning_rate=1e-2, save_steps=10_000,
    ).model  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "beta"), [(RawMethod, 0.25), (LogSigmoidMethod, 0.15)], ids=["raw", "log-sigmoid"])
def test_rl_on_a_fixed_utility_ends_at_its_optimum(testbed, tmp_path, kind, beta):
    """p·exp(u/β)/Z by enumeration, u written out here: r, and log of σ(r − 85 % quantile of the references)."""
    expected = []
    for row, (prompt, responses) in enumerate(zip(PROMPTS, testbed.responses, strict=True)):
        r, logp = testbed.rewards(prompt, responses), np.array(list(responses.values()))
        centre = np.sort(testbed.calibrator.ref_rewards_PK[row])[[216, 217]] @ [0.25, 0.75]  # 255 · 0.85 = 216.75
        expected.append(softmax(logp + (r if kind is RawMethod else -np.log(1 + np.exp(centre - r))) / beta))
    assert min(testbed.distances(testbed.reference, expected)) > 0.3, "the optimum is far from where training starts"
    # 0.0009 (raw) and 0.0014 (log-sigmoid) were seen; a sharper log-sigmoid, β = 0.1, was at 0.019 after these steps.
    assert max(testbed.distances(online(testbed, tmp_path, kind, beta), expected)) < 0.02


@pytest.mark.slow
def test_rl_on_standardised_rewards_ends_at_its_fixed_point(testbed, tmp_path):
    """p·exp(r/(β σ)), σ the standard deviation of r under the policy itself: not the optimum at any one β."""
    beta = 1.2  # below about 0.9 there is no fixed point: the policy goes on to its best response alone
    model = online(testbed, tmp_path, StandardisedMethod, beta)
    expected, at_the_start = [], []
    for prompt, responses in zip(PROMPTS, testbed.responses, strict=True):
        r, logp = testbed.rewards(prompt, responses), np.array(list(responses.values()))
        q = np.exp(logp)
        for step in range(200):
            q = softmax(logp + r / beta / np.sqrt(q @ r**2 - (q @ r) ** 2))
            if step == 0:
                at_the_start.append(q)
        expected.append(q)
    apart = [0.5 * np.abs(a - b).sum() for a, b in zip(expected, at_the_start, strict=True)]
    assert max(apart) > 0.04, "σ under the reference would give another policy"
    assert min(testbed.distances(testbed.reference, expected)) > 0.3
    # Seeded. The same tolerance as for the solvers, and noise of groups of 128 in σ.
    assert max(testbed.distances(model, expected)) < 0.03


# --- losses ---


@pytest.fixture(scope="module")
def uniform(tmp_path_factory):
    rewards_PY = np.random.default_rng(5).permuted(np.arange(62.0)).reshape(2, 31) / 31.0
    pool = tabular.fitted(tabular.uniform_store(tmp_path_factory.mktemp("uniform"), rewards_PY))[1]
    return rewards_PY, pool


def all_pairs(pool) -> list[tuple[int, int]]:
    """Every pair of different rollouts of one prompt."""
    return [
        (int(a), int(b))
        for p in range(len(pool.prompts))
        for rows in [np.flatnonzero(pool.prompt_R == p)]
        for a in rows
        for b in rows
        if a != b
    ]


def test_dpo_on_preferences_of_bradley_and_terry(uniform):
    """p·exp(r/β)/Z: every pair both ways, with the probability of each as its weight."""
    rewards_PY, pool = uniform
    loss = DPO(beta=0.7)
    reward_R = [
        rewards_PY[p, tabular.RESPONSES.index(list(t))] for p, t in zip(pool.prompt_R, pool.token_ids, strict=True)
    ]
    pairs = np.array(all_pairs(pool))
    margins = np.array([reward_R[a] - reward_R[b] for a, b in pairs])
    examples = Examples(pairs, np.zeros(len(pairs)), 1 / (1 + np.exp(-margins)))
    reached = tabular.minimise(loss, pool, examples)
    assert tabular.total_variation(reached, softmax(np.log(tabular.P) + rewards_PY / 0.7, axis=1)) < 1e-3


def test_ipo_on_all_pairs_is_calibrated_rlhf(uniform):
    """Pairs of independent draws: p·exp(C/τ)/Z with the quantile C under the reference, ties one half."""
    rewards_PY, pool = uniform
    loss = IPO(beta=0.3)
    pairs = [(a, b) if pool.ranks_R[a] > pool.ranks_R[b] else (b, a) for a, b in all_pairs(pool)]
    tied = np.array([pool.ranks_R[a] == pool.ranks_R[b] for a, b in pairs])
    targets = np.where(tied, 0.0, 0.5 / loss.beta)  # a draw of one response against itself says nothing
    reached = tabular.minimise(loss, pool, Examples(np.array(pairs), targets, np.ones(len(pairs))))
    below = (rewards_PY[:, None, :] < rewards_PY[:, :, None]) @ tabular.P
    same = (rewards_PY[:, None, :] == rewards_PY[:, :, None]) @ tabular.P
    calibrated = below + 0.5 * same
    # Leaving each rollout's comparison with itself out takes 1/(2K) off every C: it drops out.
    expected = softmax(np.log(tabular.P) + calibrated / loss.beta, axis=1)
    assert tabular.total_variation(reached, expected) < 1e-3


def numerical_optimum(objective) -> np.ndarray:
    """The distribution at which an objective of (P, Y) log-ratios is least, by another program and another method."""

    def value(logits):
        return objective(log_softmax(logits.reshape(2, -1), axis=1) - np.log(tabular.P))

    found = minimize(
        value, np.tile(np.log(tabular.P), 2), method="L-BFGS-B", options={"maxiter": 5000, "maxfun": 10**6}
    )
    return softmax(found.x.reshape(2, -1), axis=1)


def test_qrpo_as_published(uniform):
    """Inclusive quantiles and log Z = log β + 1/β: near p·exp(C/β)/Z, and exactly the numerical optimum."""
    rewards_PY, pool = uniform
    loss = QRPO(beta=0.4)
    quantile = (rewards_PY[:, None, :] <= rewards_PY[:, :, None]) @ tabular.P
    target = quantile / 0.4 - np.log(0.4) - 1 / 0.4
    expected = numerical_optimum(lambda ratios: float(((target - ratios) ** 2 @ tabular.P).sum()))
    reached = tabular.minimise(loss, pool)
    assert tabular.total_variation(reached, expected) < 1e-3
    calibrated = softmax(np.log(tabular.P) + quantile / 0.4, axis=1)
    assert tabular.total_variation(reached, calibrated) < 0.1


def test_bonbon_on_all_pairs(uniform):
    """n = 2: half the weight on the better one's likelihood; the IPO part has the target 1."""
    rewards_PY, pool = uniform
    loss = BoNBoN(n=2, alpha=0.3)
    assert loss.beta == 0.5
    assert BoNBoN(n=4).beta == pytest.approx(1 / (2 * 3 * (1 + 1 / 2 + 1 / 3)))
    pairs = np.array([(a, b) for a, b in all_pairs(pool) if pool.ranks_R[a] > pool.ranks_R[b]])
    reached = tabular.minimise(loss, pool, Examples(pairs, np.ones(len(pairs)), np.ones(len(pairs))))
    weight = (rewards_PY[:, :, None] > rewards_PY[:, None, :]) * tabular.P[:, None] * tabular.P  # of better, worse

    def objective(ratios):
        behind = (ratios[:, :, None] - ratios[:, None, :] - 1.0) ** 2
        return float((weight * (-0.3 * ratios[:, :, None] + 0.7 * behind)).sum())

    assert tabular.total_variation(reached, numerical_optimum(objective)) < 2e-3


def test_the_target_of_bonbon_is_the_expected_difference():
    """Under Best-of-n log-ratios are (n − 1) log u but for a constant: Monte Carlo over best and worst of n."""
    u = np.sort(np.random.default_rng(0).uniform(size=(200_000, 4)), axis=1)
    differences = 3 * (np.log(u[:, -1]) - np.log(u[:, 0]))
    error = differences.std() / np.sqrt(len(u))
    # Four standard errors: a false alarm in 16,000 seeds; the seed is fixed.
    assert 0.5 / BoNBoN(n=4).beta == pytest.approx(differences.mean(), abs=4 * error)


def test_best_and_worst_of_every_n(uniform):
    _, pool = uniform
    pairs = best_and_worst(pool, 4)
    assert 16 <= len(pairs.rollouts_NM) <= 18, "36 rollouts of two prompts; equal ones give no pair"
    first = np.flatnonzero(pool.prompt_R == 0)[:4]
    assert pairs.rollouts_NM[0].tolist() == [first[pool.ranks_R[first].argmax()], first[pool.ranks_R[first].argmin()]]
    with pytest.raises(InputError, match="no prompt has 40 rollouts"):
        best_and_worst(pool, 40)
    with pytest.raises(InputError, match="best and the worst of 1"):
        best_and_worst(pool, 1)
    assert IPO(beta=0.25, n=2).examples(pool).targets_N[0] == 2.0
