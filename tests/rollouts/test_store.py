"""The store: what belongs together stays together, and nothing written is lost."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest

from infalign.errors import InputError, MismatchError, StorageError
from infalign.rollouts.key import RolloutKey, model_fingerprint, tokenizer_fingerprint
from infalign.rollouts.store import RolloutStore
from infalign.run.testbed.toy import random_llama

KEY = RolloutKey(model="sha256:m", tokenizer="sha256:t", max_new_tokens=4, seed=7)


def rows(prompt_id, indices, **changes):
    count = len(indices)
    columns = {
        "prompt_id": [prompt_id] * count,
        "index": list(indices),
        "text": [f"{prompt_id}-{i}" for i in indices],
        "token_ids": [[i, 1] for i in indices],
        "logprob": [-float(i) for i in indices],
        "num_tokens": [2] * count,
        "finish_reason": ["stop"] * count,
    }
    return {**columns, **changes}


@pytest.fixture
def store(tmp_path):
    store = RolloutStore.open(tmp_path / "store", KEY)
    store.append(rows("y", [1, 0]))
    store.append(rows("x", [0, 1, 2]))
    return store


def test_columns_come_in_prompt_and_index_order(store):
    assert store.column_PK("logprob", ["x", "y"], 2).tolist() == [[0.0, -1.0], [0.0, -1.0]]
    assert store.lists_PK("token_ids", ["y", "x"], 2) == [[[0, 1], [1, 1]], [[0, 1], [1, 1]]]
    assert store.lists_PK("text", ["y"], 1) == [["y-0"]]
    assert store.column_PK("num_tokens", ["x"], 3).dtype == np.int64
    assert (store.column_PK("finish_reason", ["x"], 3) == "length").tolist() == [[False] * 3]
    assert len(store) == 5
    assert store.present() == {"x": {0, 1, 2}, "y": {0, 1}}


def test_what_is_missing_is_named(store):
    with pytest.raises(InputError, match="1 of 6 rollouts are missing, the first is rollout 2 of prompt y"):
        store.column_PK("logprob", ["x", "y"], 3)
    with pytest.raises(InputError, match="no column 'lenght'"):
        store.column_PK("lenght", ["x"], 1)
    store.append(rows("z", [0], logprob=[None]))
    with pytest.raises(InputError, match="1 rollout has no logprob, the first is rollout 0 of prompt z"):
        store.column_PK("logprob", ["x", "z"], 1)
    with pytest.raises(InputError, match="twice"):
        store.column_PK("logprob", ["x", "x"], 1)


def test_nothing_is_written_twice(store):
    for again in (rows("x", [3, 2]), rows("x", [5, 5])):
        with pytest.raises(InputError, match="already there"):
            store.append(again)
    assert len(store) == 5


@pytest.mark.parametrize(
    "change",
    [
        {"model": "sha256:other"},
        {"tokenizer": "other"},
        {"max_new_tokens": 5},
        {"seed": 8},
        {"temperature": 0.7},
        {"top_p": 0.9},
        {"sampler": "openai"},
    ],
)
def test_another_key_is_refused_and_named(store, change):
    (name,) = change
    with pytest.raises(MismatchError, match=f"{name} was .* and is now") as caught:
        RolloutStore.open(store.path, replace(KEY, **change))
    assert "; " not in str(caught.value.what)  # names what differs and nothing else
    assert RolloutStore.open(store.path, KEY).key == KEY
    assert RolloutStore.read(store.path).key == KEY


def test_stores_that_cannot_be_opened(tmp_path, store):
    with pytest.raises(StorageError, match="no rollout store"):
        RolloutStore.read(tmp_path / "nothing")
    (store.path / "manifest.json").write_text(json.dumps({"format": 99}))
    with pytest.raises(StorageError, match="format 99"):
        RolloutStore.read(store.path)
    (store.path / "manifest.json").write_text('{"format": 1, "key": {"model": "x"}}')
    with pytest.raises(StorageError, match="damaged"):
        RolloutStore.read(store.path)
    (store.path / "manifest.json").unlink()
    with pytest.raises(StorageError, match="no manifest"):
        RolloutStore.open(store.path, KEY)
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError):
        RolloutStore.open(tmp_path / "file" / "store", KEY)


def test_a_damaged_shard_is_named(store):
    shard = store.path / "rollouts" / "000001.parquet"
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(StorageError, match=r"000001\.parquet"):
        store.column_PK("logprob", ["x"], 1)


def test_rewards_lie_beside_rollouts(store):
    store.append_rewards("fun:length@1", ["x", "x", "y"], [1, 0, 0], [1.5, 0.5, None], [None, None, "too short"])
    store.append_rewards("other", ["x"], [0], [9.0])
    assert store.rewards_PK("fun:length@1", ["x"], 2).tolist() == [[0.5, 1.5]]
    assert store.reward_sources == ["fun:length@1", "other"]
    with pytest.raises(InputError, match=r"1 of 2 rollouts could not be scored.*rollout 0 of prompt y \(too short\)"):
        store.rewards_PK("fun:length@1", ["x", "y"], 1)
    with pytest.raises(InputError, match="1 of 2 rewards of other are missing"):
        store.rewards_PK("other", ["x"], 2)
    # A second try replaces the first.
    store.append_rewards("fun:length@1", ["y"], [0], np.array([4.0]))
    assert store.rewards_PK("fun:length@1", ["x", "y"], 1).tolist() == [[0.5], [4.0]]
    assert store.rewards("fun:length@1").num_rows == 3


def test_unusable_rewards_are_refused(store):
    with pytest.raises(InputError, match="infinite"):
        store.append_rewards("source", ["x"], [0], [np.inf])
    with pytest.raises(InputError, match="2 rewards"):
        store.append_rewards("source", ["x"], [0], [1.0, 2.0])
    with store.writing_rewards("source", {"kind": "a"}):
        pass
    with (
        pytest.raises(MismatchError, match="kind was 'a' and is now 'b'"),
        store.writing_rewards("source", {"kind": "b"}),
    ):
        pass


def test_sampling_that_is_not_the_policy_does_not_calibrate(tmp_path):
    store = RolloutStore.open(tmp_path / "store", replace(KEY, temperature=0.5))
    store.append(rows("x", [0]))
    store.append_rewards("source", ["x"], [0], [1.0])
    with pytest.raises(InputError, match=r"temperature 0\.5"):
        store.rewards_PK("source", ["x"], 1)
    assert store.rewards_PK("source", ["x"], 1, allow_modified_sampling=True).tolist() == [[1.0]]
    with pytest.raises(InputError, match="temperature"):
        replace(KEY, temperature=0.0)


def test_other_readers_can_read_it(store):
    store.append_rewards("fun", ["x"], [1], [2.0])
    dataset = store.dataset()
    assert dataset["text"][:2] == ["y-1", "y-0"]
    assert dataset["reward_fun"] == [None, None, None, 2.0, None]
    assert pq.read_table(store.path / "rollouts").num_rows == 5


def test_one_writer_at_a_time(store):
    other = RolloutStore.read(store.path)
    with store.writing():
        with pytest.raises(StorageError, match="somebody else"):
            other.append(rows("z", [0]))
        store.append(rows("z", [0]))
        assert len(other) == 6  # readers are never in the way
        # Another process is refused as well; scoring is another table, with its own lock.
        code = f"""
            from infalign.errors import StorageError
            from infalign.rollouts.store import RolloutStore
            store = RolloutStore.read({str(store.path)!r})
            store.append_rewards("source", ["x"], [0], [1.0])
            try:
                with store.writing():
                    print("accepted")
            except StorageError:
                print("refused")
        """
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True, timeout=60
        )
        assert done.stdout.strip() == "refused"
    other.append(rows("z", [1]))


def test_a_full_disk_loses_nothing_and_can_be_resumed(store):
    """The system refuses files above a size: what a full disk does, without filling one."""
    code = f"""
        import resource, signal
        from infalign.errors import StorageError
        from infalign.rollouts.store import RolloutStore
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        store = RolloutStore.read({str(store.path)!r})
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))
        one = dict(prompt_id=["big"], index=[0], text=["abcdefgh" * 1 + "".join(map(str, range(5000)))],
                   token_ids=[[1]], logprob=[0.0], num_tokens=[1], finish_reason=["stop"])
        try:
            store.append(one)
        except StorageError as error:
            print("refused:", error)
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        store.append(one)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True, timeout=60
    )
    assert "cannot be written" in done.stdout
    assert "nothing is lost" in done.stdout
    assert len(store) == 6
    assert not list((store.path / "rollouts").glob("*.part"))


def test_fingerprints_tell_models_apart(tmp_path, words, letters):
    first = model_fingerprint(words.path)
    # The same weights saved again elsewhere are the same model.
    words.model.save_pretrained(tmp_path / "copy")
    assert model_fingerprint(tmp_path / "copy") == first
    other = random_llama(tmp_path / "other", 5, spread=1.2, max_length=24, seed=2)
    assert model_fingerprint(other) != first
    config = json.loads((tmp_path / "copy" / "config.json").read_text())
    (tmp_path / "copy" / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.1}))
    assert model_fingerprint(tmp_path / "copy") != first
    with pytest.raises(InputError, match="no model weights"):
        model_fingerprint(tmp_path)

    before = tokenizer_fingerprint(letters.tokenizer)
    letters.tokenizer(["a", "bcd"], padding=True, truncation=True, max_length=5)
    assert tokenizer_fingerprint(letters.tokenizer) == before
    assert tokenizer_fingerprint(words.tokenizer) != before
    letters.tokenizer.chat_template = "{{ messages }}"
    assert tokenizer_fingerprint(letters.tokenizer) != before
    letters.tokenizer.chat_template = None
