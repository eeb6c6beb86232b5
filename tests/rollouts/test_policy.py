"""Policies: drawn exactly, whoever is in the batch; log-ratios and KL as enumeration gives them; one base in memory."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chi2

from infalign.errors import InputError, MismatchError
from infalign.reshape.reshaping import log_mixture
from infalign.rollouts.batches import Missing
from infalign.rollouts.key import model_fingerprint
from infalign.rollouts.mixture import MixturePolicy
from infalign.rollouts.models import load_policy, load_tokenizer
from infalign.rollouts.opening import PolicyOpener, open_policies, open_policy, save_policy
from infalign.rollouts.policy import LocalPolicy, UnfinishedError
from infalign.rollouts.reshaped import ReshapedPolicy, bridge_log_partition
from infalign.rollouts.sample import sample
from infalign.rollouts.store import RolloutStore
from tests.rollouts.policies import PROMPTS, TOKENS, Bounded, Pair, make_pair

IDS = [prompt.id for prompt in PROMPTS]
FALSE_ALARM = 1e-5  # of each chi-square; the draws are seeded, so that it is decided once and for all


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Pair:
    return make_pair(tmp_path_factory.mktemp("pair"))


def drawn(policy, folder, count, *, seed=1, batch_size=None, prompts=PROMPTS):
    store = RolloutStore.open(folder, policy.key(max_new_tokens=TOKENS, seed=seed))
    policy.draw(prompts, count, store=store, batch_size=batch_size)
    return store


def as_rows(store) -> dict[tuple[str, int], dict[str, Any]]:
    return {(row["prompt_id"], row["index"]): row for row in store.table().to_pylist()}


def require_follows(pair, tokens_PK, log_target):
    """Chi-square of drawn responses against a distribution over all of them, for each prompt."""
    for p, tokens_K in enumerate(tokens_PK):
        place = {response: i for i, response in enumerate(pair.responses[p])}
        observed = np.bincount([place[tuple(one)] for one in tokens_K], minlength=len(place))
        expected = len(tokens_K) * np.exp(log_target[p])
        common = expected >= 8
        observed = np.append(observed[common], observed[~common].sum())
        expected = np.append(expected[common], max(expected[~common].sum(), 1e-9))
        keep = expected > 1e-6
        statistic = ((observed - expected)[keep] ** 2 / expected[keep]).sum()
        assert statistic < chi2.isf(FALSE_ALARM, keep.sum() - 1)


def every_response(pair):
    """(P, Y) responses to score; all prompts have as many."""
    return [[list(one) for one in responses] for responses in pair.responses]


# --- local models and adapters ----------------------------------------------------------------------------------------


def test_a_local_policy_draws_what_sample_draws(pair, tmp_path):
    policy = open_policy(pair.base)
    model, tokenizer = load_policy(pair.base)
    old = sample(
        model, tokenizer, PROMPTS, 7, store=tmp_path / "old", model_name=pair.base, max_new_tokens=TOKENS, seed=1
    )
    assert old == 14
    store = drawn(policy, tmp_path / "new", 7)
    assert store.key == RolloutStore.read(tmp_path / "old").key
    assert as_rows(store) == as_rows(RolloutStore.read(tmp_path / "old"))


def test_an_adapter_and_its_base_share_one_model(pair):
    for order in ([pair.base, pair.adapter], [pair.adapter, pair.base]):
        base, aligned = sorted(open_policies(order), key=lambda one: one.source != str(pair.base))
        assert base.model is aligned.model
        alone = sum(weight.numel() for weight in load_policy(pair.base)[0].parameters())
        lora = sum(w.numel() for name, w in aligned.model.named_parameters() if "lora" in name)
        assert sum(weight.numel() for weight in base.model.parameters()) == alone + lora
        ids, responses = [[2, 3]] * len(pair.responses[0]), pair.responses[0]
        for _ in range(2):  # whichever was used before
            np.testing.assert_allclose(base.logprobs(ids, responses), pair.log_p[0], atol=2e-5)
            np.testing.assert_allclose(aligned.logprobs(ids, responses), pair.log_q[0], atol=2e-5)


def test_switching_an_adapter_leaves_what_is_trained(pair):
    base, aligned = open_policies([pair.base, pair.adapter])
    trained = {name: name.endswith("lora_A.weight") for name, _ in aligned.model.named_parameters()}
    for name, weight in aligned.model.named_parameters():
        weight.requires_grad_(trained[name])
    aligned.model.train()
    with base.active() as model, torch.no_grad():
        assert not model.training
    assert aligned.model.training
    assert {name: w.requires_grad for name, w in aligned.model.named_parameters()} == trained


def test_a_policy_without_a_source_has_no_key(pair):
    model, tokenizer = load_policy(pair.base)
    with pytest.raises(InputError, match="not known where the weights"):
        LocalPolicy(model, tokenizer).key(max_new_tokens=2, seed=0)


# --- mixtures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_a_mixture_is_drawn_exactly(pair, tmp_path, weight):
    mixture = MixturePolicy(pair.base, pair.adapter, weight)
    store = drawn(mixture, tmp_path / "store", 3000)
    with np.errstate(divide="ignore"):
        log_target = [
            np.logaddexp(np.log(1 - weight) + pair.log_p[p], np.log(weight) + pair.log_q[p]) for p in range(2)
        ]
    require_follows(pair, store.lists_PK("token_ids", IDS, 3000), log_target)
    assert store.table(["logprob"])["logprob"].null_count == 6000, "no second pass when drawing"


def test_a_rollout_of_a_mixture_does_not_depend_on_its_batch(pair, tmp_path):
    mixture = MixturePolicy(pair.base, pair.adapter, 0.4)
    one = as_rows(drawn(mixture, tmp_path / "one", 40))
    other = as_rows(drawn(mixture, tmp_path / "other", 40, batch_size=7, prompts=PROMPTS[::-1]))
    assert one == other
    some = as_rows(drawn(mixture, tmp_path / "some", 9))
    assert some == {at: row for at, row in one.items() if at[1] < 9}


def test_part_and_tokens_are_independent_and_nested(pair):
    """What part a rollout comes from: as often as the weight says, and monotone in the weight."""
    small, large = (MixturePolicy(pair.base, pair.adapter, weight) for weight in (0.2, 0.6))
    parts = np.array([[m.part_of(3, "x", index) for index in range(4000)] for m in (small, large)])
    assert (parts[1] >= parts[0]).all()
    for share, weight in zip(parts.mean(axis=1), (0.2, 0.6), strict=True):
        assert abs(share - weight) < 4.5 * np.sqrt(weight * (1 - weight) / 4000)  # false alarm 7e-6
    # The base's own rollouts of this seed are other ones: comparing both would not compare a rollout with itself.
    asked, key = [Missing("p", [2, 3], list(range(200)))], small.base.key(max_new_tokens=TOKENS, seed=3)
    nothing = MixturePolicy(small.base, small.aligned[0], 0.0)
    rows = [list(policy.draw_rows(asked, key)) for policy in (nothing, small.base)]
    mine, base = ([ids for batch in one for ids in batch["token_ids"]] for one in rows)
    assert mine != base


def test_log_ratios_and_kl_of_a_mixture_are_exact(pair):
    for weight in (0.0, 0.25, 0.9):
        base, aligned = open_policies([pair.base, pair.adapter])
        mixture = MixturePolicy(base, aligned, weight)
        ratios = mixture.log_ratios(base, PROMPTS, every_response(pair))
        for p in range(2):
            log_ratio = np.log1p(weight * np.expm1(pair.log_ratios(p)))
            np.testing.assert_allclose(ratios.log_ratios_PG[p], log_ratio, atol=5e-5)
            chance = np.exp(pair.log_p[p] + log_ratio)
            kl = float(chance @ log_ratio)
            assert float(chance @ ratios.exact_kl_PG[p]) == pytest.approx(kl, abs=5e-6), "the prefixes' KLs add up"
            if weight:
                spread = [
                    np.sqrt(chance @ (value - kl) ** 2) for value in (ratios.log_ratios_PG[p], ratios.exact_kl_PG[p])
                ]
                assert spread[1] < 0.7 * spread[0], "they vary less than the log-ratios do"
        flat = [list(one) for one in pair.responses[0]]
        whole = mixture.logprobs([[2, 3]] * len(flat), flat)
        np.testing.assert_allclose(whole, pair.log_p[0] + np.log1p(weight * np.expm1(pair.log_ratios(0))), atol=5e-5)


def test_a_mixture_of_several(pair, tmp_path):
    """Three parts; the KL to a mixture as reference; weights that sum to one."""
    other = make_pair(tmp_path / "other", seed=3)
    # The third part is a full model of another kind: the merged one.
    base, aligned, merged = open_policies([pair.base, pair.adapter, pair.merged])
    mixture = MixturePolicy(base, [aligned, merged], [0.2, 0.5])
    same = MixturePolicy(base, aligned, 0.7)
    ratios = mixture.log_ratios(same, PROMPTS, every_response(pair))
    np.testing.assert_allclose(ratios.log_ratios_PG, 0, atol=5e-5)
    np.testing.assert_allclose(ratios.exact_kl_PG, 0, atol=5e-6)
    unlike = MixturePolicy(base, [aligned, open_policy(other.base)], [0.2, 0.8])
    store = drawn(unlike, tmp_path / "store", 4000)
    require_follows(
        pair,
        store.lists_PK("token_ids", IDS, 4000),
        [np.logaddexp(np.log(0.2) + pair.log_q[p], np.log(0.8) + other.log_p[p]) for p in range(2)],
    )
    for weight in (1.2, -0.1, [0.5], [0.6, 0.6]):
        with pytest.raises(InputError, match="weights are"):
            MixturePolicy(base, [aligned, merged] if isinstance(weight, list) else aligned, weight)


def test_log_mixture_is_stable():
    np.testing.assert_allclose(log_mixture((0.25,), np.array([-1e6, 0.0, 1e6])), [np.log(0.75), 0, 1e6 + np.log(0.25)],
                               atol=1e-12)  # fmt: skip
    np.testing.assert_allclose(log_mixture((0.2, 0.3), np.array([[0.0, 1.0]])), np.log(0.7 + 0.3 * np.e))
    np.testing.assert_allclose(log_mixture((0.0,), np.array([3.0, -3.0])), 0)
    np.testing.assert_allclose(log_mixture((1.0,), np.array([3.0, -3.0])), [3, -3])


# --- reshaped policies ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "reshaping",
    [Bounded(), Bounded(mixture_weight=0.5), Bounded(low=0.0, high=1.5, slope=1.0, mixture_weight=0.2)],
    ids=["from the base", "from a mixture", "nearly a mixture"],
)
def test_a_reshaped_policy_is_drawn_exactly(pair, tmp_path, reshaping):
    policy = ReshapedPolicy(pair.base, pair.adapter, reshaping)
    store = drawn(policy, tmp_path / "store", 2500)
    weights = [pair.log_p[p] + reshaping.log_density(pair.log_ratios(p)) for p in range(2)]
    log_z = np.array([np.logaddexp.reduce(one) for one in weights])
    require_follows(pair, store.lists_PK("token_ids", IDS, 2500), [w - z for w, z in zip(weights, log_z, strict=True)])
    acceptance = np.exp(log_z - reshaping.log_bound)
    total = policy.total
    assert total.accepted == 5000 == len(store)
    assert total.tokens > sum(store.table(["num_tokens"])["num_tokens"].to_pylist())
    for p, prompt_id in enumerate(IDS):
        tries = policy.counts[prompt_id].tries
        # Normal approximation of a negative binomial; false alarm 6e-5.
        assert abs(tries - 2500 / acceptance[p]) < 4 * np.sqrt(2500 * (1 - acceptance[p])) / acceptance[p]
    np.testing.assert_allclose(policy.log_partition(IDS), log_z, atol=0.05)
    said = json.loads((store.path / "tries.json").read_text())
    assert said["tries"] == total.tries
    assert said["tokens"] == total.tokens


def test_a_reshaped_rollout_does_not_depend_on_its_batch(pair, tmp_path):
    policy = ReshapedPolicy(pair.base, pair.adapter, Bounded(mixture_weight=0.3))
    one = as_rows(drawn(policy, tmp_path / "one", 20))
    assert one == as_rows(drawn(policy, tmp_path / "other", 20, batch_size=7, prompts=PROMPTS[::-1]))
    stopped = RolloutStore.open(tmp_path / "stopped", policy.key(max_new_tokens=TOKENS, seed=1))

    class KilledError(Exception):
        pass

    def kill(done, total, text):
        if done > 10:
            raise KilledError

    with pytest.raises(KilledError):
        policy.draw(PROMPTS, 20, store=stopped, batch_size=8, progress=kill)
    assert 10 < len(stopped) < 40
    again = ReshapedPolicy(pair.base, pair.adapter, Bounded(mixture_weight=0.3))
    again.draw(PROMPTS, 20, store=RolloutStore.open(tmp_path / "stopped", again.key(max_new_tokens=TOKENS, seed=1)))
    assert as_rows(stopped) == one


def test_log_ratios_of_a_reshaped_policy(pair, tmp_path):
    """Log g − log Z with Z from both sides' rollouts: with every response as often as it is likely, exact."""
    reshaping = Bounded(mixture_weight=0.4)
    base, aligned = open_policies([pair.base, pair.adapter])
    policy = ReshapedPolicy(base, aligned, reshaping)
    drawn_PG = drawn(policy, tmp_path / "own", 400).lists_PK("token_ids", IDS, 400)
    ref_PK = drawn(base, tmp_path / "ref", 400, seed=2).lists_PK("token_ids", IDS, 400)
    ratios = policy.log_ratios(base, PROMPTS, drawn_PG, ref_token_ids_PK=ref_PK)
    assert ratios.exact_kl_PG is ratios.log_ratios_PG
    from_tries = policy.log_ratios(base, PROMPTS, drawn_PG)
    for p in range(2):
        log_g = reshaping.log_density(pair.log_ratios(p))
        log_z = np.logaddexp.reduce(pair.log_p[p] + log_g)
        place = {response: i for i, response in enumerate(pair.responses[p])}
        exact = (log_g - log_z)[[place[tuple(one)] for one in drawn_PG[p]]]
        for found in (ratios, from_tries):
            offsets = found.log_ratios_PG[p] - exact
            np.testing.assert_allclose(offsets, offsets[0], atol=5e-5)
            assert abs(offsets[0]) < 0.12  # about 4 standard errors of log Z from 400 rollouts
    with pytest.raises(InputError, match="relative to"):
        policy.log_ratios(aligned, PROMPTS, drawn_PG, ref_token_ids_PK=ref_PK)
    with pytest.raises(InputError, match="up to a constant"):
        policy.logprobs([[2]], [[3]])


def test_bridge_log_partition():
    """Gaussian p with g = e^{cx}, log Z = c²/2: unbiased to second order, and better than either side alone."""
    rng, c, size = np.random.default_rng(0), 1.5, 64
    ref = c * rng.standard_normal((2000, size))
    own = c * (rng.standard_normal((2000, size)) + c)
    found = bridge_log_partition(ref, own)
    alone = np.log(np.exp(ref).mean(axis=1))
    assert abs(found.mean() - c**2 / 2) < 4 * found.std() / np.sqrt(2000) + 0.01
    assert found.std() < 0.6 * alone.std()
    np.testing.assert_allclose(bridge_log_partition(ref + 900, own + 900), found + 900)


def test_a_cap_on_tries_is_an_error_and_loses_nothing(pair, tmp_path):
    hopeless = Bounded(low=-20.0, high=0.9, slope=3.0)
    policy = ReshapedPolicy(pair.base, pair.adapter, hopeless, max_tries=2)
    store = RolloutStore.open(tmp_path / "store", policy.key(max_new_tokens=TOKENS, seed=1))
    with pytest.raises(UnfinishedError, match=r"not accepted in 2 tries \(\d+ of \d+ tries were accepted") as error:
        policy.draw(PROMPTS, 50, store=store)
    assert set(error.value.failures) == set(IDS)
    assert len(store) == policy.total.accepted > 0
    patient = ReshapedPolicy(pair.base, pair.adapter, hopeless)
    patient.draw(PROMPTS, 50, store=store)
    assert len(store) == 100


def test_a_wrong_bound_is_an_error(pair, tmp_path):
    @dataclass(frozen=True)
    class Wrong(Bounded):
        @property
        def log_bound(self) -> float:
            return -1.0

    policy = ReshapedPolicy(pair.base, pair.adapter, Wrong())
    with pytest.raises(InputError, match="log_bound is too small"):
        drawn(policy, tmp_path / "store", 50)
    key = replace(policy.key(max_new_tokens=TOKENS, seed=1), temperature=0.7)
    with pytest.raises(InputError, match="temperature"):
        list(policy.draw_rows([Missing("p", [2, 3], [0])], key))


# --- on disk ----------------------------------------------------------------------------------------------------------


def test_a_mixture_on_disk(pair, tmp_path):
    mixture = MixturePolicy(pair.base, pair.adapter, 0.25)
    save_policy(mixture, tmp_path / "mixture")
    assert json.loads((tmp_path / "mixture" / "policy.json").read_text())["kind"] == "mixture"
    opened = open_policy(tmp_path / "mixture")
    assert isinstance(opened, MixturePolicy)
    assert opened.fingerprint == mixture.fingerprint == model_fingerprint(tmp_path / "mixture")
    assert opened.weights == (0.25,)
    assert MixturePolicy(pair.base, pair.adapter, 0.3).fingerprint != mixture.fingerprint
    assert as_rows(drawn(opened, tmp_path / "one", 12)) == as_rows(drawn(mixture, tmp_path / "other", 12))
    with pytest.raises(MismatchError):
        RolloutStore.open(tmp_path / "one", open_policy(pair.base).key(max_new_tokens=TOKENS, seed=1))
    assert load_tokenizer(tmp_path / "mixture").get_vocab() == pair.tokenizer.get_vocab()
    with pytest.raises(InputError, match="mixture policy of several models"):
        load_policy(tmp_path / "mixture")
    opener = PolicyOpener()
    assert opener.open(tmp_path / "mixture").base is opener.open(pair.base), "the reference is in memory once"
    with pytest.raises(InputError, match="neither a mixture"):
        save_policy(opener.open(pair.base), tmp_path / "plain")


@pytest.mark.parametrize("content", ["{", '{"kind": "sum"}', '{"kind": "mixture", "base": "a", "aligned": "b"}'])
def test_a_damaged_policy_file(tmp_path, content):
    (tmp_path / "policy.json").write_text(content)
    with pytest.raises(InputError, match="policy"):
        open_policy(tmp_path)
