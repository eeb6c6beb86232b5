"""The model card says what was done and measured, whatever the names are, and no machine's paths."""

from dataclasses import replace

import pytest
from huggingface_hub import ModelCard

from infalign.evaluation.reshaped import ReshapedRecord
from infalign.evaluation.results import Measured, MethodResult, ProcedureResult
from infalign.run.model_card import CardFacts, ReshapedFacts, model_card, plain, reshaped_card, write_model_card
from infalign.training.landing import Landing
from tests.report.example import MIXTURE, RESHAPED, reshaped_methods

FACTS = CardFacts(
    name="demo", base="org/base-model", procedure="Best-of-4", transform="optimal", beta=0.1234, planned_kl=0.5,
    kl_budget=0.5, landing=Landing(1.07, 0.44, 0.497, 0.012), steps=200, rollouts_per_step=256, max_new_tokens=64,
    adapter=False, rewards=("my_module:grade",), reward_key="my_module:grade@12ab", num_ref=64, ties="midrank",
    tie_mass=0.0123, prompts="org/prompts", num_train=512, num_evaluation=128, seed=7, versions={"trl": "1.16.0"},
)  # fmt: skip


def measured(estimate, half):
    return Measured(estimate, half / 2, estimate - half, estimate + half, [estimate])


RESULT = MethodResult(
    label="optimal", reward="my_module:grade@12ab", num_prompts=128, num_samples=32, num_ref_samples=32,
    confidence=0.95, kl=measured(0.512, 0.03), useful_kl=measured(0.2, 0.02), kl_efficiency=0.4,
    kl_efficiency_error=0.05, tie_share=0.01, over_n=[], diagnostics=None,
    procedures=[ProcedureResult("Best-of-4", 4, None, measured(0.712, 0.015), 0.873, None)],
)  # fmt: skip


def test_it_states_what_was_done_and_loads_again(tmp_path):
    write_model_card(tmp_path, FACTS)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.base_model == "org/base-model"
    assert card.data.library_name == "transformers"
    assert "infalign" in card.data.tags
    for told in (
        "Best\\-of\\-4", "0.1234", "0.497 ± 0.012", "scaled by 1.07", "200 of 256 rollouts", "my\\_module:grade",
        "| Reference rollouts per prompt | 64 |", "midrank", "0.0123", "| Training prompts | 512 |", "trl 1.16.0",
        "Not yet.",
    ):  # fmt: skip
        assert told in card.text, told


def test_what_was_measured_comes_with_intervals():
    text = model_card(replace(FACTS, result=RESULT)).text
    assert "| Best\\-of\\-4 | 71.2 (69.7 to 72.7) % | 87.3 % |" in text
    assert "0.512 (0.482 to 0.542) nats" in text
    assert "128 held-out prompts, 32 fresh responses each" in text
    assert "Not yet" not in text


def test_a_fixed_beta_has_no_budget_and_an_adapter_is_one():
    card = model_card(replace(FACTS, kl_budget=None, landing=None, adapter=True))
    assert "KL budget" not in card.text
    assert card.data.library_name == "peft"


@pytest.mark.parametrize(
    "name",
    [
        "a | b",
        "x\n---\nlicense: mit",
        "<script>alert(1)</script>",
        "[link](http://x)",
        "`code` **bold** # head",
        "",
        "é🙂",
    ],
)
def test_hostile_names_stay_names(tmp_path, name):
    facts = replace(FACTS, name=name, base=name, transform=name, prompts=name, rewards=(name,), reward_key=name)
    write_model_card(tmp_path, facts)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.to_dict() == model_card(replace(FACTS, base="no hub name")).data.to_dict()
    assert "base_model" not in card.data.to_dict()
    assert "<script" not in card.text
    rows = [line for line in card.text.splitlines() if line.startswith("|")]
    assert {line.replace("\\|", "").count("|") for line in rows} == {3}, "every row has two cells"
    assert len([line for line in card.text.splitlines() if line.startswith("#")]) == 6, "no heading of theirs"


def test_paths_are_names_only(tmp_path):
    assert plain("/home/someone/models/reference") == "reference"
    assert plain("../data/prompts.jsonl") == "prompts.jsonl"
    assert plain("C:\\Users\\someone\\prompts.jsonl") == "prompts.jsonl"
    assert plain(str(tmp_path)) == plain(tmp_path.name)
    assert plain("org/name") == "org/name"
    card = model_card(replace(FACTS, base=str(tmp_path / "base"), prompts=str(tmp_path / "p.jsonl"))).content
    assert str(tmp_path) not in card


def part_of(content, result=None, **changes):
    record = ReshapedRecord.of_fit(content) if result is None else result.reshaped
    reshaped = ReshapedFacts("own-mixture", record, 20, result)
    return replace(FACTS, trained_weight=record.trained_weight, reshaped=reshaped, landing=None, **changes)


def test_a_part_of_a_mixture_says_that_it_is_not_to_be_used_alone():
    text = model_card(part_of(MIXTURE)).text
    assert "**Not meant to be used alone.** Alone its KL from the reference is 2.400 ± 0.100 nats" in text
    assert "| Trained inside a mixture | 25.0% of it" in text
    assert "Used otherwise it" not in text
    assert "draws each response from this model with probability 0.125, otherwise from org/base\\-model" in text
    before_fit = model_card(replace(FACTS, trained_weight=0.25, landing=None)).text
    assert "Alone it is much further from the reference" in before_fit
    assert "Not meant to be used alone" not in model_card(FACTS).text


def test_a_mixture_card_has_code_commands_two_model_names_and_the_caution():
    facts = part_of(MIXTURE, adapter=True)
    text = reshaped_card(facts, facts.reshaped).text
    for told in (
        'policy = ia.open_policy(".")', "max_new_tokens=64", "policy.draw(",
        "infalign decode \"A prompt\" --model . --reward REWARD --procedure best-of-4",
        "--lora-modules aligned=ADAPTER", "--model-name BASE --aligned aligned", "--aligned-weight 0.125",
        "**A single sample.** It was made for Best\\-of\\-4", "predicted to be 61.0 ± 2.0 %.",
        "88% of its samples are the reference's own", "| Best\\-of\\-4 win rate, % | 79.0 ± 1.5 | not yet |",
    ):  # fmt: skip
        assert told in text, told
    assert "lora" not in reshaped_card(replace(facts, adapter=False), facts.reshaped).text


def test_a_policy_drawn_by_rejection_tells_its_acceptance_and_offers_no_weight():
    result = reshaped_methods()[1]
    facts = part_of(RESHAPED, result)
    text = reshaped_card(facts, facts.reshaped).text
    assert "| proposals accepted, % | 40.0 | 42.0 |" in text
    assert "| tokens per response, rejected ones included | 30.0 | 29.0 |" in text
    assert "--aligned-weight" not in text
    assert "reference's own" not in text
    assert "not yet" not in text
    card = model_card(facts).text
    assert "Not meant to be used alone" not in card, "it was trained to be used alone"
    assert "## Reshaped policy for Best\\-of\\-4" in card


def test_hostile_names_stay_names_in_the_reshaped_card():
    name = "x\n---\n`<script>` [a](b) | # head"
    facts = part_of(MIXTURE, name=name, base=name)
    text = reshaped_card(facts, replace(facts.reshaped, name=name)).text
    assert "<script" not in text
    assert len([line for line in text.splitlines() if line.startswith("#")]) == 4, "no heading of theirs"
