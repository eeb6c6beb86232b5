"""`infalign serve` and `decode` in front of a real server that offers a base and an adapter on it."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from scipy.stats import binom

from infalign.rollouts.opening import open_policies
from tests.rollouts.policies import make_pair
from tests.rollouts.served_models import ServedModels
from tests.serving.process import Served

CLIENTS, N, WEIGHT = 64, 16, 0.25
REWARD = """
def length(prompts, completions):
    return [float(len(c)) for c in completions]
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    pair = make_pair(tmp_path_factory.mktemp("pair"))
    return dict(zip(("base", "adapter"), open_policies([pair.base, pair.adapter]), strict=True))


def test_sixty_four_clients_of_a_mixture(models, tmp_path):
    (tmp_path / "mixture_rewards.py").write_text(REWARD)
    with ServedModels(models) as upstream:
        command = ("serve", "--upstream", upstream.url, "--model-name", "base", "--aligned", "adapter")
        command += ("--aligned-weight", WEIGHT, "--reward", "mixture_rewards:length", "--n", N, "--max-new-tokens", 2)
        command += ("--seed", 0)
        with Served(*command, cwd=tmp_path) as server, ThreadPoolExecutor(CLIENTS) as clients:
            # One prompt for all: whoever comes first, the same candidates are asked of the same models.
            request = {"model": "base", "prompt": "a b"}
            asked = [clients.submit(server.post, "/v1/completions", request) for _ in range(CLIENTS)]
            answers = [one.result() for one in asked]
    assert [status for status, _, _ in answers] == [200] * CLIENTS, "nothing is lost"
    assert all(len(answer["choices"]) == 1 for _, _, answer in answers)
    assert sum(upstream.choices.values()) == CLIENTS * N
    low, high = binom.interval(1 - 1e-5, CLIENTS * N, WEIGHT)  # false alarm 1e-5; the draws are seeded
    assert low <= upstream.choices["adapter"] <= high
