"""What a reward is shown: texts of responses, messages, columns, and what a classifier reads."""

import datetime
import decimal
import json
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from infalign._io.plain import plain
from infalign.audit.refusal import RefusalPhrases
from infalign.errors import InputError, RewardError
from infalign.integrations.openrlhf import PromptTexts
from infalign.rewards.rehearsal import rehearse
from infalign.rewards.source import FunctionReward, SequenceClassificationReward
from infalign.rollouts.fill import response_token_ids
from infalign.rollouts.prompts import Prompt, load_prompts
from infalign.rollouts.texts import response_texts, shown
from infalign.rollouts.tokens import prompt_token_ids
from infalign.training.drop_in import texts_in_context
from infalign.training.trainer import positions_from_mask
from tests.conformance.families import FAMILIES, make_tokenizer

CHAT = [{"role": "user", "content": "the cat"}]


# --- the text of a response ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_response_reads_as_it_does_behind_its_prompt(family):
    tokenizer = make_tokenizer(family)
    prompt = tokenizer("the cat")["input_ids"]
    word = tokenizer("cat the", add_special_tokens=False)["input_ids"][-1]
    assert response_texts(tokenizer, [prompt, prompt], [[word], [word, word]]) == [" the", " the the"]
    assert response_texts(tokenizer, [prompt], [[]]) == [""]
    rows = {"token_ids": [None] * 2, "text": [" the", " the the"], "finish_reason": ["stop", "length"]}
    assert response_token_ids(tokenizer, rows) == [[word, tokenizer.eos_token_id], [word, word]]


def test_a_decoder_that_rewrites_the_prompt_leaves_the_response_to_itself():
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<u>": 0, "it": 1, "'": 2, "s": 3}, unk_token="<u>")),
        clean_up_tokenization_spaces=True,  # "it ' s" becomes "it's"
    )
    assert tokenizer.decode([1, 2, 3]) == "it's"
    assert tokenizer.decode([1, 2]) == "it '"
    assert response_texts(tokenizer, [[1, 2]], [[3]]) == ["s"]


def test_one_form_for_text_and_one_for_messages():
    answer = [{"role": "assistant", "content": "yes"}]
    assert shown(["p", "p", CHAT, CHAT], ["yes", answer, "yes", answer]) == (
        ["p", "p", CHAT, CHAT],
        ["yes", "yes", answer, answer],
    )
    assert shown([CHAT], ["yes"])[0][0] is not CHAT
    refused = RefusalPhrases()
    no = "Sorry, no."
    assert refused.score([CHAT, "p"], [[{"role": "assistant", "content": no}], no]).tolist() == [1.0, 1.0]


def test_a_served_query_reads_alike_whoever_decodes_it():
    for family in ("llama2", "bert", "unigram"):
        tokenizer = make_tokenizer(family)
        prompt, ids = Prompt("the cat"), tokenizer("the cat")["input_ids"]
        mat = tokenizer("cat mat", add_special_tokens=False)["input_ids"][-1]
        texts = PromptTexts([prompt], tokenizer, [" mat the", "", " the"])
        for query in (tokenizer.decode([*ids, mat, 3]), "the cat" + tokenizer.decode([mat, 3])):
            assert texts.response(query, "the cat") == " mat", query
        # Where references also begin in the middle of a word, nobody can tell, and nothing is added.
        assert PromptTexts([prompt], tokenizer, [" mat", "s"]).response("the cats", "the cat") == "s"


def test_a_template_with_the_time_is_rendered_at_one_moment():
    tokenizer = make_tokenizer("gpt2")
    # As Llama's templates ask for the date, and in a block of its own.
    tokenizer.chat_template = (
        "{%- if strftime_now is defined %}{%- set day = strftime_now('%Y-%m-%d') %}{%- endif %}"
        "{% for m in messages %}{{ day }} {{ strftime_now('%H:%M') }} {{ m['content'] }}{% endfor %}"
    )
    fixed = Prompt(CHAT, rendered_at="2019-03-04T05:06:07")
    assert tokenizer.decode(prompt_token_ids(tokenizer, [fixed])[0]) == "2019-03-04 05:06 the cat"
    assert PromptTexts([fixed], tokenizer).prompt_id("2019-03-04 05:06 the cat") == fixed.id
    assert fixed.id == Prompt(CHAT).id
    now = tokenizer.decode(prompt_token_ids(tokenizer, [Prompt(CHAT)])[0])
    assert now.startswith(str(datetime.date.today().year))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_trainer_of_ones_own_decodes_alone_and_is_put_right(family):
    tokenizer = make_tokenizer(family)
    ends = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=[3, 4]))
    trainer = SimpleNamespace(processing_class=tokenizer, model=ends)
    word = tokenizer("cat the", add_special_tokens=False)["input_ids"][-1]
    alone = tokenizer.decode([word])
    prompts, ids = [Prompt("the cat"), Prompt(CHAT)], [[word, 4], [word]]
    given = [alone, [{"role": "assistant", "content": alone}]]
    assert texts_in_context(trainer, prompts, given, ids) == [" the", " the"]
    assert texts_in_context(trainer, prompts, given, None) is given
    turns = [alone, [{"role": "assistant", "content": alone}, {"role": "tool", "content": "1"}]]
    assert texts_in_context(trainer, prompts, turns, ids) is turns


# --- messages and columns --------------------------------------------------------------------------------------------


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_messages_keep_all_their_fields(tmp_path):
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    chats = [
        [*CHAT, {"role": "assistant", "content": None, "tool_calls": [call]}, {"role": "tool", "content": "1"}],
        [*CHAT, {"role": "assistant", "tool_calls": [call | {"id": "2"}]}, {"role": "tool", "content": "1"}],
        [{"role": "user", "content": "the cat", "name": "ann"}],
        [{"role": "user", "content": "the cat", "name": None}],
        CHAT,
    ]
    prompts = load_prompts(write(tmp_path / "p.jsonl", [{"prompt": chat} for chat in chats]))
    assert (len(prompts), prompts.duplicates) == (4, 1)
    assert prompts[0].prompt == chats[0]
    assert prompts[1].prompt[1] == {"role": "assistant", "content": None, "tool_calls": [call | {"id": "2"}]}
    assert prompts[2].prompt == chats[2]
    assert prompts[3].prompt == CHAT
    assert '"name": "f"' in prompts[0].text


@pytest.mark.parametrize(
    ("chat", "message"),
    [
        ([*CHAT, {"role": "assistant", "content": "a mat"}], "the last message is the assistant's answer"),
        ([{"role": "user", "content": [{"type": "text", "text": "the cat"}]}], "a list of parts"),
        ([{"role": "user"}], "not {role, content}"),
        ([{"role": "assistant", "tool_calls": []}], "not {role, content}"),
    ],
)
def test_messages_that_cannot_be_shown_are_refused(tmp_path, chat, message):
    with pytest.raises(InputError, match=message):
        load_prompts(write(tmp_path / "p.jsonl", [{"prompt": chat}]))


def test_columns_are_plain_wherever_they_come_from(tmp_path):
    table = pa.table(
        {
            "prompt": ["a"],
            "when": [datetime.datetime(2020, 1, 2, 3, 4, 5)],
            "day": [datetime.date(2020, 1, 2)],
            "raw": [b"\xff\x00"],
            "price": [decimal.Decimal("1.50")],
            "took": [datetime.timedelta(seconds=1.5)],
            "pairs": pa.array([[("k", 1)]], pa.map_(pa.string(), pa.int64())),
            "small": pa.array([0.5], pa.float32()),
        }
    )
    pq.write_table(table, tmp_path / "p.parquet")
    (prompt,) = load_prompts(tmp_path / "p.parquet")
    assert prompt.row == {
        "prompt": "a",
        "when": "2020-01-02T03:04:05",
        "day": "2020-01-02",
        "raw": "/wA=",
        "price": "1.50",
        "took": 1.5,
        "pairs": [["k", 1]],
        "small": 0.5,
    }
    assert json.loads(json.dumps(prompt.row)) == prompt.row
    assert plain({1: np.float32(2.0), "a": np.arange(2), "t": (np.bool_(True),)}) == {
        "1": 2.0,
        "a": [0, 1],
        "t": [True],
    }
    with pytest.raises(InputError, match="it holds a object, which cannot be kept"):
        plain(object())


_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary() | st.decimals()
    | st.datetimes() | st.dates() | st.times() | st.timedeltas() | st.uuids(),
    lambda inner: st.lists(inner) | st.tuples(inner) | st.dictionaries(st.text() | st.integers(), inner),
    max_leaves=8,
)  # fmt: skip


@given(_VALUES)
def test_what_is_plain_survives_json(value):
    found = plain(value)
    assert json.loads(json.dumps(found)) == found
    assert plain(found) == found


# --- which token is scored -------------------------------------------------------------------------------------------


def words(count=12, *, around=None, **special):
    """A tokenizer of the words "!", "w1", "w2", …; "!" has id 0."""
    vocabulary = {"!": 0, **{f"w{i}": i for i in range(1, count)}, "<a>": count, "<z>": count + 1}
    tokenizer = Tokenizer(models.WordLevel(vocabulary))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if around:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=around, special_tokens=[("<a>", count), ("<z>", count + 1)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def saved(model, tokenizer, folder):
    torch.manual_seed(0)
    model = model.eval()
    for weight in model.parameters():
        weight.data.normal_(0, 0.5)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


def gpt2(**more):
    return GPT2ForSequenceClassification(
        GPT2Config(vocab_size=14, n_embd=16, n_layer=1, n_head=2, n_positions=32, num_labels=1, **more)
    )


def logit(model, ids):
    with torch.no_grad():
        return model(torch.tensor([ids])).logits.item()


@pytest.mark.parametrize("pad", [None, 0, 3, 13], ids=["none", "!", "w3", "<z>"])
def test_the_last_token_counts_whatever_its_id(tmp_path, pad):
    names = {0: "!", 3: "w3", 13: "<z>"}
    tokenizer = words(**({} if pad is None else {"pad_token": names[pad]}))
    model = saved(gpt2(pad_token_id=pad, bos_token_id=None, eos_token_id=None), tokenizer, tmp_path)
    texts = ["w1", "w1 !", "w1 ! !", "w1 w3", "w2 w3 w3 w3 w3", "! !", "w1 w3 !"]
    source = SequenceClassificationReward(tmp_path, batch_size=4)
    scores = source.score([""] * len(texts), texts)
    model.config.pad_token_id = -1  # equal to no token: nothing is taken for padding
    alone = [logit(model, tokenizer(text)["input_ids"]) for text in texts]
    assert scores == pytest.approx(alone, abs=1e-5)
    assert len(set(np.round(scores, 6))) == len(texts)


def test_texts_that_hold_every_token_there_is(tmp_path):
    tokenizer = words()
    model = saved(gpt2(bos_token_id=None, eos_token_id=None), tokenizer, tmp_path)
    whole = " ".join(tokenizer.convert_ids_to_tokens(range(14)))
    texts = [whole, f"{whole} !", "w1", f"{whole} w1"]
    scores = SequenceClassificationReward(tmp_path).score([""] * 4, texts)
    model.config.pad_token_id = -1
    assert scores == pytest.approx([logit(model, tokenizer(text)["input_ids"]) for text in texts], abs=1e-5)


def test_a_long_text_keeps_its_special_tokens(tmp_path):
    bert = BertForSequenceClassification(
        BertConfig(vocab_size=14, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
                   max_position_embeddings=8, num_labels=1, pad_token_id=0)
    )  # fmt: skip
    llama = LlamaForSequenceClassification(
        LlamaConfig(vocab_size=14, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
                    max_position_embeddings=8, num_labels=1, pad_token_id=None)
    )  # fmt: skip
    text = " ".join(f"w{1 + i % 9}" for i in range(20))
    template = "{{ bos_token }} {{ messages[0]['content'] }} {{ messages[1]['content'] }}"
    for name, model, around, special, tail in (
        ("bert", bert, "<a> $A <z>", {"cls_token": "<a>", "sep_token": "<z>"}, [13]),
        ("llama", llama, "<a> $A", {"bos_token": "<a>", "chat_template": template}, []),
    ):
        tokenizer = words(around=around, **special)
        model = saved(model, tokenizer, tmp_path / name)
        model.config.pad_token_id = -1
        inside = tokenizer(text, add_special_tokens=False)["input_ids"]
        cut = [12, *inside[-(7 - len(tail)) :], *tail]
        source = SequenceClassificationReward(tmp_path / name)
        assert source.score([""], [text])[0] == pytest.approx(logit(model, cut), abs=1e-5)
        assert source.num_truncated == 1
        # What is asked for is bounded by what the model can hold.
        assert SequenceClassificationReward(tmp_path / name, max_length=99).score([""], [text])[0] == pytest.approx(
            logit(model, cut), abs=1e-5
        )
    chat = [{"role": "user", "content": text}]
    assert source.score([chat], ["w1"])[0] == pytest.approx(logit(model, [12, *inside[-6:], 1]), abs=1e-5)


def test_positions_that_begin_behind_the_padding_index(tmp_path):
    roberta = RobertaForSequenceClassification(
        RobertaConfig(vocab_size=14, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
                      max_position_embeddings=10, num_labels=1, pad_token_id=1)
    )  # fmt: skip
    tokenizer = words(around="<a> $A <z>", cls_token="<a>", sep_token="<z>")
    model = saved(roberta, tokenizer, tmp_path)
    text = " ".join(["w2"] * 20)
    scores = SequenceClassificationReward(tmp_path).score(["", ""], [text, "w3"])
    assert scores == pytest.approx([logit(model, [12, *[2] * 6, 13]), logit(model, [12, 3, 13])], abs=1e-5)


def test_a_padded_prompt_is_read_at_its_own_positions():
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=14, n_embd=16, n_layer=1, n_head=2, n_positions=32)).eval()
    ids, mask = torch.tensor([[0, 0, 0, 5, 6, 7]]), torch.tensor([[0, 0, 0, 1, 1, 1]])
    with torch.no_grad(), positions_from_mask(model):
        padded = model(input_ids=ids, attention_mask=mask).logits[:, 3:]
    alone = model(input_ids=ids[:, 3:]).logits
    torch.testing.assert_close(padded, alone)
    assert not torch.allclose(model(input_ids=ids, attention_mask=mask).logits[:, 3:], alone, atol=1e-3)


# --- a reward for the other form -------------------------------------------------------------------------------------


def length(prompts, completions):
    return [float(len(one)) for one in completions]


def yes(prompts, completions):
    return [float("yes" in one) for one in completions]


def first_word(prompts, completions):
    return [float(len(one.split()[0])) for one in completions]


def of_messages(prompts, completions):
    return [float(len(one[-1]["content"])) for one in completions]


def of_both(prompts, completions):
    return [float(len(one if isinstance(one, str) else one[-1]["content"])) for one in completions]


def strict(prompts, completions):
    return [float(json.loads(one)["score"]) for one in completions]


def zero_for_samples(prompts, completions):
    return [float(one[0]["content"] == "gold") for one in completions]


@pytest.mark.parametrize(
    ("function", "prompt", "message"),
    [
        (length, "p", None),
        (length, CHAT, "without reading what it says"),
        (yes, "p", None),
        (yes, CHAT, "without reading what it says"),
        (first_word, CHAT, "AttributeError: 'list' object has no attribute 'split'"),
        (of_messages, CHAT, None),
        (of_messages, "p", "TypeError: string indices must be integers"),
        (of_both, CHAT, None),
        (of_both, "p", None),
        (strict, "p", None),  # about what the samples say, not about their form
        (zero_for_samples, CHAT, None),
    ],
)
def test_a_reward_for_the_other_form_is_told(function, prompt, message):
    calls = []

    def counted(prompts, completions):
        calls.append(len(prompts))
        return function(prompts, completions)

    if message is None:
        rehearse(FunctionReward(counted), [Prompt(prompt)], "reward")
    else:
        with pytest.raises(InputError, match=message) as error:
            rehearse(FunctionReward(counted), [Prompt(prompt)], "reward")
        assert "as in TRL" in error.value.hint
    assert calls == [2], "one call, of two rows"


def test_a_reward_that_is_none_at_all_is_told():
    with pytest.raises(RewardError, match="it returned 1 reward for 2 completions"):
        rehearse(FunctionReward(lambda prompts, completions: [1.0], key="one"), [Prompt("p")], "reward")
