"""Exact counts of candidates from two models: in a policy, through `decode`, and in front of a server."""

import json

import numpy as np
import pytest
from scipy.stats import chi2

from infalign.errors import InputError
from infalign.procedures import BestOfN
from infalign.reshape.stratified import ExactCounts
from infalign.rewards.source import FunctionReward
from infalign.rollouts.batches import Missing
from infalign.rollouts.opening import open_policies
from infalign.rollouts.split import SplitPolicy
from infalign.select.decoder import Decoder
from infalign.select.local import PolicySampler
from tests.responses import said
from tests.rollouts.policies import PROMPTS, TOKENS, make_pair
from tests.rollouts.served_models import ServedModels
from tests.rollouts.test_policy import drawn, require_follows
from tests.runs import infalign

REWARD = """
def length(prompts, completions):
    return [float(len(c)) for c in completions]
"""


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return make_pair(tmp_path_factory.mktemp("pair"))


@pytest.mark.parametrize("counts", [(3, 1), (0, 4), (4, 0), (5, 11)])
def test_any_n_in_a_row_hold_the_counts(pair, counts):
    policy = SplitPolicy(pair.base, pair.adapter, counts)
    n = sum(counts)
    starts = set()
    for stream in map(str, range(200)):
        parts = np.array([policy.part_of(0, stream, index) for index in range(2 * n)])
        for first in range(n):
            assert tuple(np.bincount(parts[first : first + n], minlength=2)) == counts
        starts.add(tuple(parts[:n]))
    assert len(starts) == (n if 0 not in counts else 1)  # the turn begins anywhere


def test_each_candidate_alone_follows_the_mixture(pair, tmp_path):
    policy = SplitPolicy(pair.base, pair.adapter, (3, 1))
    count = 4000
    token_ids = []
    for p, prompt in enumerate(PROMPTS):
        tokens = policy.prompt_tokens([prompt], TOKENS)[0]
        wanted = [Missing(f"{i}", tokens, [0], f"{p}/{i}", prompt) for i in range(count)]
        found = {}
        for rows in policy.draw_rows(wanted, policy.key(max_new_tokens=TOKENS, seed=3)):
            found |= dict(zip(rows["prompt_id"], rows["token_ids"], strict=True))
        token_ids.append([found[f"{i}"] for i in range(count)])
    mixed = [np.logaddexp(np.log(0.75) + p, np.log(0.25) + q) for p, q in zip(pair.log_p, pair.log_q, strict=True)]
    require_follows(pair, token_ids, mixed)


def test_the_best_follows_the_exact_counts(pair):
    """The law of the best of 2 + 1 by enumeration: the distortion of `ExactCounts` on the models' CDFs of rewards."""
    policy = SplitPolicy(pair.base, pair.adapter, (2, 1))
    prompt, count = PROMPTS[0], 3000
    texts = {r: said(pair.tokenizer, prompt.prompt, r) for r in pair.responses[0]}
    value = {text: float(hash_of(text)) for text in texts.values()}
    reward = FunctionReward(lambda completions, **_: [value[one] for one in completions], key="hash")
    decoder = Decoder(PolicySampler(policy, max_new_tokens=TOKENS), reward, BestOfN(3), seed=5)
    chosen = [one.chosen.reward for one in decoder.decode([prompt] * count)]
    values = np.unique(list(value.values()))
    mass = np.zeros((2, len(values)))
    for m, log_chance in enumerate((pair.log_p[0], pair.log_q[0])):
        place = np.searchsorted(values, [value[texts[r]] for r in pair.responses[0]])
        np.add.at(mass[m], place, np.exp(log_chance))
    law = np.diff(ExactCounts((2, 1)).distortion(np.clip(np.cumsum(mass, axis=1), 0, 1)), prepend=0.0)
    observed = np.bincount(np.searchsorted(values, chosen), minlength=len(values))
    keep = law * count >= 5
    expected = np.append(law[keep], law[~keep].sum()) * count
    seen = np.append(observed[keep], observed[~keep].sum())
    used = expected > 1e-6
    assert ((seen - expected)[used] ** 2 / expected[used]).sum() < chi2.isf(1e-5, used.sum() - 1)  # seeded


def hash_of(text):
    """A value without ties to speak of."""
    return sum((ord(c) * 31**i) % 97 for i, c in enumerate(text)) % 101


def test_drawing_again_draws_the_same(pair, tmp_path):
    one, other = (drawn(SplitPolicy(pair.base, pair.adapter, (3, 1)), tmp_path / name, 8) for name in "ab")
    assert one.table().sort_by("index").equals(other.table().sort_by("index"))


@pytest.mark.parametrize("counts", [(0, 0), (1,), (1, 2, 3), (-1, 2), (0.5, 1)])
def test_bad_counts(pair, counts):
    with pytest.raises(InputError):
        SplitPolicy(pair.base, pair.adapter, counts)


def test_decode_with_exact_counts(pair, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "split_rewards.py").write_text(REWARD)
    options = ("decode", "a b", "--reward", "split_rewards:length", "--n", 16, "--max-new-tokens", TOKENS, "--json")
    local = ("--model", pair.base, "--aligned", pair.adapter)
    code, out, _ = infalign(capsys, monkeypatch, *options, *local, "--aligned-count", 4)
    assert code == 0
    assert json.loads(out)["candidates"] == 16
    models = dict(zip(("base", "adapter"), open_policies([pair.base, pair.adapter]), strict=True))
    with ServedModels(models) as upstream:
        served = ("--endpoint", upstream.url, "--model-name", "base", "--aligned", "adapter")
        code, *_ = infalign(capsys, monkeypatch, *options, *served, "--aligned-count", 4)
        assert code == 0
        assert dict(upstream.choices) == {"base": 12, "adapter": 4}
    for wrong, told in {
        ("--aligned-count", 17): "17 of 16 candidates",
        ("--aligned-count", 4, "--aligned-weight", 0.5): "a weight or a count",
        ("--aligned-count", 4, "--stop-reward", 3): "exact counts are of all candidates",
    }.items():
        code, _, err = infalign(capsys, monkeypatch, *options, *local, *wrong)
        assert (code, told in err) == (2, True), err
    code, _, err = infalign(capsys, monkeypatch, *options, "--model", pair.base, "--aligned-count", 4)
    assert (code, "a mixture has two models" in err) == (2, True), err
