"""Log-probabilities that a server did not give are computed once, and are those of the sampler."""

import numpy as np
import pytest

from infalign.errors import InputError
from infalign.rollouts.fill import compute_logprobs
from infalign.rollouts.key import RolloutKey
from infalign.rollouts.prompts import Prompt
from infalign.rollouts.sample import sample
from infalign.rollouts.store import RolloutStore

PROMPTS = [Prompt(text) for text in ("a", "b c", "c a b", "a a")]


def as_from_a_server(store, folder):
    """The same rollouts without tokens and log-probabilities."""
    key = RolloutKey(
        model="served", tokenizer="as served", max_new_tokens=store.key.max_new_tokens, seed=0, sampler="openai"
    )
    bare = RolloutStore.open(folder, key)
    rows = store.table().to_pylist()
    none = {"token_ids": None, "logprob": None, "num_tokens": None}
    bare.append({name: [{**row, **none}[name] for row in rows] for name in rows[0]})
    return bare


def test_they_are_those_of_the_sampler(words, tmp_path):
    key = RolloutKey.of(words.path, words.tokenizer, max_new_tokens=5, seed=0)
    store = RolloutStore.open(tmp_path / "drawn", key)
    sample(words.model, words.tokenizer, PROMPTS, 20, store=store)
    bare, ids = as_from_a_server(store, tmp_path / "bare"), [p.id for p in PROMPTS]
    with pytest.raises(InputError, match="compute_logprobs"):
        bare.column_PK("logprob", ids, 20)
    seen = []
    assert compute_logprobs(bare, words.model, words.tokenizer, PROMPTS[:2], chunk_size=7,
                            progress=lambda done, total, text: seen.append((done, total))) == 40  # fmt: skip
    assert seen[0] == (0, 40)
    assert seen[-1] == (40, 40)
    assert compute_logprobs(bare, words.model, words.tokenizer, PROMPTS) == 20 * (len(ids) - 2)
    assert compute_logprobs(bare, words.model, words.tokenizer, PROMPTS) == 0, "nothing is done twice"
    again = RolloutStore.read(tmp_path / "bare")
    ours, drawn = again.lists_PK("token_ids", ids, 20), store.lists_PK("token_ids", ids, 20)
    # A padding token in the middle leaves no trace in the text: such a response is another one when read back.
    same_PK = np.array(
        [[one == other for one, other in zip(*rows, strict=True)] for rows in zip(ours, drawn, strict=True)]
    )
    assert same_PK.mean() > 0.5
    np.testing.assert_allclose(
        again.column_PK("logprob", ids, 20)[same_PK], store.column_PK("logprob", ids, 20)[same_PK], atol=1e-5
    )
    np.testing.assert_array_equal(again.column_PK("num_tokens", ids, 20), [[len(one) for one in row] for row in ours])
    assert again.table(["text", "logprob"]).column_names == ["text", "logprob"]
    assert not np.isnan(again.dataset()["logprob"]).any()


def test_another_models_context_is_refused(words, tmp_path):
    store = RolloutStore.open(tmp_path / "s", RolloutKey("m", "t", max_new_tokens=10**6, seed=0, sampler="openai"))
    row = {"prompt_id": PROMPTS[0].id, "index": 0, "text": "a b " * 1_000, "token_ids": None, "logprob": None,
           "num_tokens": None, "finish_reason": "stop"}  # fmt: skip
    store.append({name: [value] for name, value in row.items()})
    with pytest.raises(InputError, match="context"):
        compute_logprobs(store, words.model, words.tokenizer, PROMPTS)
