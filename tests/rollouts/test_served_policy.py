"""A base and an adapter behind one server, under two names: mixtures, and reshaped policies where it scores text."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
from scipy.stats import binom

from infalign._io.http import Endpoint, EndpointError
from infalign.errors import InputError
from infalign.rollouts.endpoint import ServedPolicy
from infalign.rollouts.mixture import MixturePolicy
from infalign.rollouts.opening import open_policies
from infalign.rollouts.policy import UnfinishedError
from infalign.rollouts.prompts import Prompt
from infalign.rollouts.reshaped import ReshapedPolicy
from infalign.rollouts.store import RolloutStore
from infalign.select.candidates import Drawn, Request
from infalign.select.local import PolicySampler
from tests.responses import said
from tests.rollouts.policies import PROMPTS, TOKENS, Bounded, Pair, make_pair
from tests.rollouts.served_models import ServedModels
from tests.rollouts.test_policy import IDS


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Pair:
    return make_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def models(pair):
    return dict(zip(("base", "adapter"), open_policies([pair.base, pair.adapter]), strict=True))


def served(server, name, **settings):
    endpoint = Endpoint(server.url, retries=1, first_wait=0.05)
    return ServedPolicy(endpoint, name, concurrency=8, **settings)


def texts(pair, p):
    """What each response reads as; some read alike."""
    return [said(pair.tokenizer, PROMPTS[p].prompt, one) for one in pair.responses[p]]


def test_a_served_mixture(pair, models, tmp_path):
    count, weight = 1500, 0.3
    with ServedModels(models) as server:
        mixture = MixturePolicy(served(server, "base"), served(server, "adapter"), weight)
        key = mixture.key(max_new_tokens=TOKENS, seed=4)
        assert key.sampler == "openai"
        store = RolloutStore.open(tmp_path / "store", key)
        assert mixture.draw(PROMPTS, count, store=store) == 2 * count
        # The mix is as configured: a binomial test, false alarm 1e-5.
        low, high = binom.interval(1 - 1e-5, 2 * count, weight)
        assert low <= server.choices["adapter"] <= high
        assert sum(server.choices.values()) == 2 * count
        assert max(server.requests.values()) == 2, "one request for each prompt and model"
        assert mixture.draw(PROMPTS, count, store=store) == 0
    for p, drawn_K in enumerate(store.lists_PK("text", IDS, count)):
        written = texts(pair, p)
        chances = (1 - weight) * np.exp(pair.log_p[p]) + weight * np.exp(pair.log_q[p])
        for text in set(written):
            chance = float(sum(c for c, one in zip(chances, written, strict=True) if one == text))
            assert abs(drawn_K.count(text) - count * chance) < 5 * np.sqrt(count * chance) + 1


def test_sixty_four_clients_of_a_served_mixture(models):
    with ServedModels(models) as server:
        sampler = PolicySampler(
            MixturePolicy(served(server, "base"), served(server, "adapter"), 0.25), max_new_tokens=TOKENS
        )

        async def ask(client):
            request = Request(Prompt(f"a b {'c ' * (client % 5)}"), f"client {client}", range(16))
            return await asyncio.to_thread(sampler.draw, [request], client)

        async def crowd():
            return await asyncio.gather(*(ask(client) for client in range(64)))

        answers = [answer for (answer,) in asyncio.run(crowd())]
        assert all(isinstance(one, Drawn) and len(one.draws) == 16 for one in answers), "nothing is lost"
        low, high = binom.interval(1 - 1e-5, 64 * 16, 0.25)
        assert low <= server.choices["adapter"] <= high


@pytest.mark.parametrize("scores", ["echo", "prompt_logprobs"])
def test_a_server_that_scores_given_text(pair, models, tmp_path, scores):
    with ServedModels(models, scores) as server:
        base, adapter = (served(server, name, tokenizer=pair.tokenizer) for name in ("base", "adapter"))
        some = [list(one) for one in pair.responses[0]]
        np.testing.assert_allclose(base.logprobs([[2, 3]] * len(some), some), pair.log_p[0], atol=2e-5)
        np.testing.assert_allclose(adapter.logprobs([[2, 3]] * 3, some[:3]), pair.log_q[0][:3], atol=2e-5)
        reshaping = Bounded(mixture_weight=0.5)
        policy = ReshapedPolicy(base, adapter, reshaping)
        store = RolloutStore.open(tmp_path / "store", policy.key(max_new_tokens=TOKENS, seed=4))
        count = 40
        assert policy.draw(PROMPTS, count, store=store) == 2 * count
        assert policy.total.acceptance > 0.4
    for p, drawn_K in enumerate(store.lists_PK("text", IDS, count)):
        weights = np.exp(pair.log_p[p] + reshaping.log_density(pair.log_ratios(p)))
        written, chances = texts(pair, p), weights / weights.sum()
        for text in set(written):
            chance = float(sum(c for c, one in zip(chances, written, strict=True) if one == text))
            assert abs(drawn_K.count(text) - count * chance) < 5 * np.sqrt(count * chance) + 1


def test_what_a_server_cannot_do_is_said(pair, models, tmp_path):
    with ServedModels(models) as server:
        base, adapter = (served(server, name, tokenizer=pair.tokenizer) for name in ("base", "adapter"))
        policy = ReshapedPolicy(base, adapter, Bounded())
        store = RolloutStore.open(tmp_path / "store", policy.key(max_new_tokens=TOKENS, seed=4))
        with pytest.raises(InputError, match=r"cannot score given .*no log-probabilities of prompts.*a mixture"):
            policy.draw(PROMPTS, 2, store=store)
        blind = ReshapedPolicy(served(server, "base"), served(server, "adapter"), Bounded())
        store = RolloutStore.open(tmp_path / "blind", blind.key(max_new_tokens=TOKENS, seed=4))
        with pytest.raises(InputError, match="without a tokenizer"):
            blind.draw(PROMPTS, 2, store=store)
        with pytest.raises(InputError, match="no probabilities of single tokens"):
            MixturePolicy(base, adapter, 0.5).log_ratios(base, PROMPTS, [[[2]], [[2]]])
        with pytest.raises(InputError, match="is drawn by"):
            MixturePolicy(models["base"], adapter, 0.5)
        # One of the two models is gone: what the other drew is kept.
        half = MixturePolicy(served(server, "base"), served(server, "gone"), 0.5)
        store = RolloutStore.open(tmp_path / "half", half.key(max_new_tokens=TOKENS, seed=4))
        with pytest.raises(UnfinishedError, match=r"2 of 2 prompts could not be finished.*no model gone") as error:
            half.draw(PROMPTS, 20, store=store)
        assert isinstance(error.value.failures[IDS[0]], EndpointError)
        assert 0 < len(store) < 40
