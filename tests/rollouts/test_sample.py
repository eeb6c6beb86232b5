"""Sampling: from the policy itself, the same whoever else is in the batch, and exactly what is missing."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from transformers import (
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from infalign.errors import InputError, MismatchError, StorageError
from infalign.rollouts.decode import decode, draw_tokens, uniforms
from infalign.rollouts.key import RolloutKey, tokenizer_fingerprint
from infalign.rollouts.logprobs import log_ratios, sequence_logprobs
from infalign.rollouts.prompts import Prompt
from infalign.rollouts.sample import sample
from infalign.rollouts.shared_prefix import SharedPrefix
from infalign.rollouts.store import RolloutStore
from infalign.rollouts.tokens import prompt_token_ids

CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def open_store(path, toy, **changes):
    settings = {"model": "toy", "tokenizer": tokenizer_fingerprint(toy.tokenizer), "max_new_tokens": 8, "seed": 5}
    return RolloutStore.open(path, RolloutKey(**{**settings, **changes}))


PROMPTS = [Prompt(text) for text in ("Hello", "A much longer prompt than the first", "x", "What is this, please?")]


def test_stored_logprobs_equal_a_teacher_forced_recomputation(tmp_path, letters):
    store = open_store(tmp_path / "store", letters, max_new_tokens=20)
    assert sample(letters.model, letters.tokenizer, PROMPTS, 16, store=store, batch_size=24) == 64
    ids = [prompt.id for prompt in PROMPTS]
    tokens_PK = store.lists_PK("token_ids", ids, 16)
    prompt_ids_list = [ids for ids in prompt_token_ids(letters.tokenizer, PROMPTS) for _ in range(16)]
    again = sequence_logprobs(letters.model, letters.tokenizer, prompt_ids_list, [t for row in tokens_PK for t in row])
    np.testing.assert_allclose(store.column_PK("logprob", ids, 16).ravel(), again, atol=1e-4)
    end = letters.tokenizer.eos_token_id
    for row in store.table().to_pylist():
        ended = row["finish_reason"] == "stop"
        assert ended == (row["token_ids"][-1] == end)
        assert end not in row["token_ids"][:-1]
        assert row["num_tokens"] == len(row["token_ids"]) <= 20
        assert ended or row["num_tokens"] == 20
        shown = row["token_ids"][:-1] if ended else row["token_ids"]
        assert row["text"] == letters.tokenizer.decode(shown, skip_special_tokens=True)


def test_samples_follow_the_policy(tmp_path, words):
    """Chi-square against every possible response, with probabilities from a single forward pass of each."""
    prompt = Prompt("a b")
    store = open_store(tmp_path / "store", words, max_new_tokens=3)
    count = 20_000
    sample(words.model, words.tokenizer, [prompt], count, store=store)
    end, vocabulary = words.tokenizer.eos_token_id, len(words.tokenizer)
    others = [token for token in range(vocabulary) if token != end]
    responses = [
        (*start, last)
        for length in range(3)
        for start in itertools.product(others, repeat=length)
        for last in (range(vocabulary) if length == 2 else [end])
    ]
    (prompt_ids,) = prompt_token_ids(words.tokenizer, [prompt])
    logprobs = sequence_logprobs(words.model, words.tokenizer, [prompt_ids] * len(responses), responses)
    assert np.exp(logprobs).sum() == pytest.approx(1.0, abs=1e-5)
    expected = count * np.exp(logprobs)
    place = {response: i for i, response in enumerate(responses)}
    drawn = store.lists_PK("token_ids", [prompt.id], count)[0]
    counts = np.bincount([place[tuple(tokens)] for tokens in drawn], minlength=len(responses))
    common = expected >= 10
    observed = np.append(counts[common], counts[~common].sum())
    wanted = np.append(expected[common], expected[~common].sum())
    from scipy.stats import chi2

    # False alarm 1e-5, once and for all: the draw is seeded.
    assert ((observed - wanted) ** 2 / wanted).sum() < chi2.isf(1e-5, len(wanted) - 1)


@pytest.mark.parametrize("kind", ["llama", "sliding window", "absolute positions"])
def test_a_rollout_does_not_depend_on_its_batch(kind, letters):
    """Padding, dropped rows and neighbours change nothing, whatever the attention and the cache are like."""
    torch.manual_seed(0)
    size = len(letters.tokenizer)
    if kind == "llama":
        model = letters.model
    elif kind == "sliding window":
        small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        model = MistralForCausalLM(
            MistralConfig(vocab_size=size, num_key_value_heads=1, sliding_window=6, **small)
        ).eval()
    else:
        model = GPT2LMHeadModel(GPT2Config(vocab_size=size, n_embd=16, n_layer=2, n_head=2, n_positions=96)).eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(10.0)
    prompt_ids = prompt_token_ids(letters.tokenizer, PROMPTS)
    noise_BT = np.stack([uniforms(1, PROMPTS[p].id, index, 12) for p in range(4) for index in range(5)])
    # Several ends, so that rows stop at different times and are dropped.
    ends = list(range(0, size, 9))
    together = decode(model, prompt_ids, np.repeat(np.arange(4), 5), noise_BT, end_tokens=ends)
    assert len({len(one.token_ids) for one in together}) > 2
    for row, one in enumerate(together):
        (alone,) = decode(model, [prompt_ids[row // 5]], np.array([0]), noise_BT[row : row + 1], end_tokens=ends)
        assert one.token_ids == alone.token_ids
        assert one.logprob == pytest.approx(alone.logprob, abs=1e-3)
        assert one.ended == alone.ended
    logprobs = sequence_logprobs(
        model, letters.tokenizer, [prompt_ids[b // 5] for b in range(20)], [one.token_ids for one in together]
    )
    np.testing.assert_allclose([one.logprob for one in together], logprobs, atol=1e-3)


@pytest.mark.parametrize("key_heads", [1, 2, 4])
def test_sharing_prompts_changes_nothing(key_heads, letters):
    torch.manual_seed(1)
    size = len(letters.tokenizer)
    small = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=size, num_key_value_heads=key_heads, **small)).eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(10.0)
    prompt_ids = prompt_token_ids(letters.tokenizer, PROMPTS)
    prompt_of_B = np.array([0, 3, 1, 1, 2, 2, 2, 0, 2, 2, 2, 2, 3, 3, 2, 2, 2, 1])  # uneven and unordered
    noise_BT = np.random.default_rng(0).random((len(prompt_of_B), 12))
    ends = list(range(0, size, 9))
    assert SharedPrefix.fits(model, DynamicCache(config=model.config), 4, len(prompt_of_B))
    shared, apart = (
        decode(model, prompt_ids, prompt_of_B, noise_BT, end_tokens=ends, share_prompts=share)
        for share in (True, False)
    )
    assert model.config._attn_implementation == "sdpa"
    assert len({len(one.token_ids) for one in shared}) > 3
    for one, other in zip(shared, apart, strict=True):
        assert one.token_ids == other.token_ids
        assert one.logprob == pytest.approx(other.logprob, abs=1e-4)


def test_prompts_are_shared_only_where_attention_is_plain(letters):
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    sliding = MistralForCausalLM(MistralConfig(vocab_size=50, num_key_value_heads=1, sliding_window=6, **small))
    absolute = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2))
    for model in (sliding, absolute):
        assert not SharedPrefix.fits(model, DynamicCache(config=model.config), 1, 64)
    assert not SharedPrefix.fits(letters.model, DynamicCache(config=letters.model.config), 32, 64)
    assert SharedPrefix.fits(letters.model, DynamicCache(config=letters.model.config), 1, 64)


def test_a_resumed_run_gives_the_same_rollouts(tmp_path, letters):
    whole = open_store(tmp_path / "whole", letters)
    sample(letters.model, letters.tokenizer, PROMPTS, 10, store=whole)
    resumed = open_store(tmp_path / "resumed", letters)

    def stop_half_way(done, total, text):
        if done >= 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sample(letters.model, letters.tokenizer, PROMPTS, 10, store=resumed, batch_size=7, progress=stop_half_way)
    assert len(resumed) == 21
    seen = []
    drawn = sample(
        letters.model,
        letters.tokenizer,
        PROMPTS[::-1],
        10,
        store=resumed,
        batch_size=3,
        progress=lambda *s: seen.append(s),
    )
    assert drawn == 19
    assert seen[0][:2] == (21, 40)
    assert seen[-1][:2] == (40, 40)
    assert "tokens/s" in seen[-1][2]
    ids = [prompt.id for prompt in PROMPTS]
    for column in ("token_ids", "text", "finish_reason"):
        assert whole.lists_PK(column, ids, 10) == resumed.lists_PK(column, ids, 10)
    assert sample(letters.model, letters.tokenizer, PROMPTS, 10, store=resumed) == 0
    # More samples later are the same as more samples at once.
    assert sample(letters.model, letters.tokenizer, PROMPTS + PROMPTS, 12, store=resumed) == 8
    sample(letters.model, letters.tokenizer, PROMPTS, 12, store=whole, batch_size=48)
    assert whole.lists_PK("token_ids", ids, 12) == resumed.lists_PK("token_ids", ids, 12)


def test_seeds_prompts_and_indices_draw_differently():
    sources = list(itertools.product([5, 6], ["x", "y"], range(8)))
    noise = np.stack([uniforms(*source, 16) for source in sources])
    assert len({row.tobytes() for row in noise}) == len(sources)
    np.testing.assert_array_equal(uniforms(5, "x", 3, 4), noise[3, :4])  # a longer response begins with the shorter
    many = np.concatenate([uniforms(5, "x", index, 64) for index in range(500)])
    # Kolmogorov-Smirnov at 32,000 draws: beyond 2.3/sqrt(count) with probability 5e-5; seeded.
    assert np.abs(np.sort(many) - np.arange(many.size) / many.size).max() < 2.3 / many.size**0.5


def test_global_state_is_left_alone(tmp_path, letters):
    letters.model.train()
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    sample(letters.model, letters.tokenizer, PROMPTS, 2, store=open_store(tmp_path / "store", letters))
    assert torch.equal(torch.rand(1), expected)
    assert letters.model.training
    letters.model.eval()


def test_a_folder_makes_its_own_store(tmp_path, letters):
    given, settings = (letters.model, letters.tokenizer, PROMPTS, 2), {"model_name": letters.path, "max_new_tokens": 3}
    sample(*given, store=tmp_path / "s", **settings, seed=0)
    assert RolloutStore.read(tmp_path / "s").key.model.startswith("sha256:")
    with pytest.raises(MismatchError, match="seed was 0 and is now 1"):
        sample(*given, store=tmp_path / "s", **settings, seed=1)
    with pytest.raises(InputError, match="model_name"):
        sample(*given, store=tmp_path / "t")


def test_what_does_not_belong_is_refused(tmp_path, letters, words):
    store = open_store(tmp_path / "store", letters)
    with pytest.raises(MismatchError, match="tokenizer is"):
        sample(words.model, words.tokenizer, [Prompt("a")], 2, store=store)
    with pytest.raises(MismatchError, match="max_new_tokens is 9"):
        sample(letters.model, letters.tokenizer, PROMPTS, 2, store=store, max_new_tokens=9)
    with pytest.raises(InputError, match="num_samples"):
        sample(letters.model, letters.tokenizer, PROMPTS, 0, store=store)


def test_prompts_at_and_over_the_context_limit(tmp_path, letters):
    fits = Prompt("a" * 88)  # context 96, response 8
    sample(letters.model, letters.tokenizer, [fits], 2, store=open_store(tmp_path / "store", letters))
    with pytest.raises(InputError, match=r"1 prompt leaves no room.*prompt 1 .*with 89 tokens"):
        sample(
            letters.model, letters.tokenizer, [fits, Prompt("b" * 89)], 2, store=open_store(tmp_path / "two", letters)
        )


def test_chat_prompts_go_through_the_template(tmp_path, letters):
    messages = Prompt([{"role": "user", "content": "Hi"}])
    store = open_store(tmp_path / "store", letters)
    with pytest.raises(InputError, match="no chat template"):
        sample(letters.model, letters.tokenizer, [messages], 2, store=store)
    letters.tokenizer.chat_template = CHAT
    try:
        written = prompt_token_ids(letters.tokenizer, [messages, Prompt("<user>Hi<assistant>")])
        assert written[0] == written[1]
        store = open_store(tmp_path / "chat", letters)
        assert sample(letters.model, letters.tokenizer, [messages], 2, store=store) == 2
    finally:
        letters.tokenizer.chat_template = None


def test_temperature_and_nucleus(words):
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]])).repeat(4000, 1)
    uniform = torch.rand(4000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    token_B, logprob_B = draw_tokens(logits, uniform, top_p=0.75)
    assert set(token_B.tolist()) == {0, 1}
    torch.testing.assert_close(logprob_B.exp().float(), torch.tensor([0.625, 0.375])[token_B])
    token_B, logprob_B = draw_tokens(logits, uniform, temperature=0.5)
    sharpened = torch.tensor([0.5, 0.3, 0.15, 0.05]) ** 2
    sharpened /= sharpened.sum()
    torch.testing.assert_close(logprob_B.exp().float(), sharpened[token_B])
    # 4000 draws, standard deviation below 0.008; seeded.
    torch.testing.assert_close(torch.bincount(token_B, minlength=4) / 4000, sharpened, atol=0.04, rtol=0)


def test_draws_at_the_edges_are_possible_tokens():
    logits = torch.tensor([[0.0, float("-inf"), 0.0, float("-inf")]]).repeat(3, 1)
    last = float(np.nextafter(1.0, 0.0))
    token_B, logprob_B = draw_tokens(logits, torch.tensor([0.0, 0.5, last], dtype=torch.float64))
    assert token_B.tolist() == [0, 2, 2]
    assert logprob_B.tolist() == pytest.approx([np.log(0.5)] * 3)


def test_log_ratios(tmp_path, letters, words):
    """On an enumerable pair of policies both estimates have the exact KL as their mean."""
    from transformers import AutoModelForCausalLM

    from infalign.run.testbed.toy import random_llama

    ref = AutoModelForCausalLM.from_pretrained(
        random_llama(tmp_path / "ref", 5, spread=1.0, max_length=24, seed=9)
    ).eval()
    policy, tokenizer = words.model, words.tokenizer
    end, others = tokenizer.eos_token_id, [0, 2, 3, 4]
    responses = [[end]] + [[a, b] for a in others for b in range(5)]
    prompts = [Prompt("a b"), Prompt("c")]
    ratios = log_ratios(policy, ref, tokenizer, prompts, [responses, responses], batch_size=5)
    prompt_ids = prompt_token_ids(tokenizer, prompts)
    for p in range(2):
        log_policy = sequence_logprobs(policy, tokenizer, [prompt_ids[p]] * len(responses), responses)
        log_ref = sequence_logprobs(ref, tokenizer, [prompt_ids[p]] * len(responses), responses)
        weight = np.exp(log_policy)
        assert weight.sum() == pytest.approx(1.0, abs=1e-5)
        kl = weight @ (log_policy - log_ref)
        np.testing.assert_allclose(ratios.log_ratios_PG[p], log_policy - log_ref, atol=1e-5)
        assert weight @ ratios.exact_kl_PG[p] == pytest.approx(kl, abs=1e-5)
        spread = [
            weight @ values**2 - (weight @ values) ** 2 for values in (ratios.exact_kl_PG[p], ratios.log_ratios_PG[p])
        ]
        assert spread[0] < spread[1]
    same = log_ratios(policy, policy, tokenizer, prompts, [responses, responses])
    assert not same.log_ratios_PG.any()
    assert not same.exact_kl_PG.any()
    with pytest.raises(InputError, match="tokens, the reference"):
        log_ratios(policy, letters.model, tokenizer, prompts, [responses, responses])
    with pytest.raises(InputError, match="2 prompts"):
        log_ratios(policy, ref, tokenizer, prompts, [responses])


def test_an_empty_response_has_logprob_zero(words):
    assert sequence_logprobs(words.model, words.tokenizer, [[2], [2]], [[], [1]])[0] == 0.0
    with pytest.raises(InputError, match="prompt 0 has no tokens"):
        sequence_logprobs(words.model, words.tokenizer, [[]], [[1]])


def test_ctrl_c_in_a_batch_keeps_the_responses_that_had_ended(tmp_path, words):
    whole, part = (open_store(tmp_path / name, words, max_new_tokens=12) for name in ("whole", "part"))
    prompts = [Prompt("a"), Prompt("b c")]
    sample(words.model, words.tokenizer, prompts, 256, store=whole)
    calls = iter(range(100))

    def press(*_):
        if next(calls) == 4:  # the prompts, and three tokens
            raise KeyboardInterrupt

    hook = words.model.register_forward_pre_hook(press)
    with pytest.raises(KeyboardInterrupt):
        sample(words.model, words.tokenizer, prompts, 256, store=part)  # one batch of 512 rows
    hook.remove()
    kept = part.table().to_pylist()
    expected = [row for row in whole.table().to_pylist() if row["finish_reason"] == "stop" and row["num_tokens"] <= 4]
    assert len(kept) == len(expected) > 100
    drawn = sample(words.model, words.tokenizer, prompts, 256, store=part)
    assert drawn == 512 - len(kept)
    ids = [prompt.id for prompt in prompts]
    for column in ("token_ids", "text", "finish_reason"):
        assert part.lists_PK(column, ids, 256) == whole.lists_PK(column, ids, 256)


def test_rewards_of_rollouts_that_are_gone_go_with_them(tmp_path, words):
    """What is drawn in their place may be another text, at a server."""
    store = open_store(tmp_path / "store", words)
    prompts = [Prompt("a"), Prompt("b c")]
    ids = [prompt.id for prompt in prompts]
    for part in prompts:
        sample(words.model, words.tokenizer, [part], 3, store=store)
    store.append_rewards(
        "length", [one for one in ids for _ in range(3)], [0, 1, 2] * 2, [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    )
    (tmp_path / "store" / "rollouts" / "000000.parquet").unlink()
    store.forget_missing()
    left = RolloutStore.read(tmp_path / "store").rewards("length").to_pylist()
    assert [(row["prompt_id"], row["index"], row["reward"]) for row in left] == [
        (ids[1], index, reward) for index, reward in enumerate([4.0, 5.0, 6.0])
    ]


def test_a_changed_byte_in_a_shard_is_an_error(tmp_path, words):
    store = open_store(tmp_path / "store", words)
    sample(words.model, words.tokenizer, [Prompt("a")], 64, store=store)
    shard = tmp_path / "store" / "rollouts" / "000000.parquet"
    content = bytearray(shard.read_bytes())
    place = content.index(b"stop")
    content[place] ^= 1
    shard.write_bytes(bytes(content))
    with pytest.raises(StorageError, match=r"000000\.parquet: .*Delete this one file and give the same command again"):
        store.table()
    shard.unlink()
    assert sample(words.model, words.tokenizer, [Prompt("a")], 64, store=store) == 64
