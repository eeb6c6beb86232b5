"""Recipes: typed, strict, with messages that say what, where, and give a hint."""

from pathlib import Path

import pytest

from infalign.errors import InputError, StorageError
from infalign.procedures import BestOfN, OrderStatistic, Standard, WorstOfN
from infalign.run.recipe import load_recipe, named_transform, parse_recipe, transform_name
from infalign.transforms import Exponential, Identity

MINIMAL = """
name: demo
policy: {model: my-model}
reward: {function: "rewards:score"}
prompts: {source: prompts.jsonl}
kl_budget: 0.5
"""


def parse(text: str, *overrides: str, folder: Path = Path("/nowhere")):
    return parse_recipe(text, where="demo.yaml", folder=folder, overrides=overrides)


def test_minimal_recipe_has_sane_defaults():
    recipe = parse(MINIMAL)
    assert recipe.target_procedure == BestOfN(4)
    assert recipe.transforms == ["optimal", "identity"]
    assert not recipe.policy.trust_remote_code
    assert not recipe.policy.allow_pickle


@pytest.mark.parametrize(
    ("name", "procedure"),
    [("standard", Standard()), ("worst-of-8", WorstOfN(8)), ("3-of-5", OrderStatistic(k=3, n=5))],
)
def test_a_procedure_is_written_as_on_the_command_line(name, procedure):
    assert parse(MINIMAL, f"procedure={name}").target_procedure == procedure


def test_relative_paths_belong_to_the_recipes_folder(tmp_path):
    (tmp_path / "my-model").mkdir()
    recipe = parse(MINIMAL, folder=tmp_path)
    assert recipe.policy.model == str(tmp_path / "my-model")
    assert recipe.prompts.source == str(tmp_path / "prompts.jsonl")


def test_a_hub_name_stays_a_hub_name(tmp_path):
    assert parse(MINIMAL, "policy.model=org/name", folder=tmp_path).policy.model == "org/name"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trainig.steps=3", r"unknown key trainig; did you mean training\?"),
        ("training.step=3", r"unknown key training\.step; did you mean steps\?"),
        ("rollouts.num_ref=1", r"rollouts\.num_ref: .*greater than or equal to 2"),
        ("kl_budget=-1", r"kl_budget: .*greater than 0"),
        ("beta=0", r"beta: .*greater than 0"),
        ("beta=0.1", r"exactly one of beta and kl_budget"),
        ("procedure=bestof4", r"procedure: "),
        ("procedure=best-of-0", r"procedure: "),
        ("transform=sharp", r"transform: a transform is one of: optimal"),
        ("compare_with=[optimal]", r"compare_with repeats"),
        ("compare_with=[raw]", r"compare_with\.0: raw is a baseline, not a transform; write \{baseline: raw\}"),
        ("compare_with=[identity, dpo]", r"compare_with\.1: dpo is a baseline.*\{baseline: dpo\}"),
        ("evaluation.num_samples=2", r"evaluation.num_samples is 2, but its procedures draw up to 4"),
        ("policy.model=null", r"policy\.model is missing"),
        ("reward.model=x", r"give one of model, function and url"),
        ("name=a/b", r"name: "),
        ("name=..", r"name: use letters"),
        ("training.steps=many", r"training\.steps: "),
        ("policy=3", r"policy: a section of settings goes here, not 3"),
        ("procedure={kind: order-statistic, k: 5, n: 3}", r"procedure: OrderStatistic: k = 5 is more than n = 3"),
        ("transform={exponential: .nan}", r"transform: t = nan is not a finite number"),
        ("transform={exponential: true}", r"transform: a transform is one of"),
        ("transform={file: reference.json}", r"cannot be called reference"),
        ("kl_budget=.inf", r"kl_budget: .*finite"),
        ("seed=-1", r"seed: "),
        ("seed=4294967296", r"seed: "),
        ("evaluation.procedures=[]", r"evaluation\.procedures: .*at least 1"),
    ],
)
def test_unusable_settings_are_refused_in_one_line(override, message):
    with pytest.raises(InputError, match=message) as caught:
        parse(MINIMAL, override)
    assert str(caught.value).startswith("demo.yaml")
    assert "\n" not in str(caught.value)


def test_a_key_that_comes_twice_is_refused():
    with pytest.raises(InputError, match="the key kl_budget comes twice"):
        parse(MINIMAL + "kl_budget: 0.7\n")
    merged = parse(MINIMAL + "evaluation: &more {num_samples: 16}\nrollouts: {<<: {num_ref: 8}, max_new_tokens: 9}\n")
    assert (merged.rollouts.num_ref, merged.evaluation.num_samples) == (8, 16)


def test_overrides_are_yaml_values():
    recipe = parse(MINIMAL, "procedure=worst-of-8", "training.lora={r: 4}", "evaluation.num_samples=16")
    assert recipe.target_procedure.label == "Worst-of-8"
    assert recipe.training.lora == {"r": 4}
    assert parse(MINIMAL, "transform={exponential: 1e1}").transform == {"exponential": 10.0}, "text, to YAML"


@pytest.mark.parametrize("bad", ["nonsense", "=3", "name.deep=3"])
def test_bad_overrides_say_so(bad):
    with pytest.raises(InputError, match="--set"):
        parse(MINIMAL, bad)


def test_the_target_procedure_is_always_evaluated():
    recipe = parse(MINIMAL, "procedure=best-of-8", "evaluation.procedures=[standard]", "evaluation.num_samples=8")
    assert recipe.evaluation_procedures == [Standard(), BestOfN(8)]


def test_missing_file_and_broken_yaml(tmp_path):
    with pytest.raises(StorageError, match="cannot read the recipe"):
        load_recipe(tmp_path / "absent.yaml")
    (tmp_path / "broken.yaml").write_text("name: [")
    with pytest.raises(InputError, match="not valid YAML"):
        load_recipe(tmp_path / "broken.yaml")
    (tmp_path / "list.yaml").write_text("- a")
    with pytest.raises(InputError, match="a recipe is a mapping"):
        load_recipe(tmp_path / "list.yaml")


def test_transforms_by_name(tmp_path):
    assert named_transform("optimal") is None
    assert named_transform("identity") == Identity()
    assert named_transform({"exponential": -10.0}) == Exponential(-10.0)
    Exponential(3.0).save(tmp_path / "mine.json")
    recipe = parse(MINIMAL, "transform={file: mine.json}", folder=tmp_path)
    assert named_transform(recipe.transform) == Exponential(3.0)
    assert [transform_name(t) for t in recipe.transforms] == ["mine", "identity"]
    assert transform_name({"exponential": 10.0}) != transform_name({"exponential": -10.0})


def test_the_packaged_quickstart_recipe_is_valid():
    from importlib import resources

    text = (resources.files("infalign") / "run" / "recipe" / "builtin" / "quickstart.yaml").read_text()
    assert parse(text).testbed is not None


def test_one_reward_or_several(tmp_path):
    several = MINIMAL.replace('{function: "rewards:score"}', '[{function: "rewards:score"}, {model: rm, weight: 3}]')
    recipe = parse_recipe(several, where="r", folder=tmp_path, overrides=["reward.1.weight=2"])
    assert [reward.weight for reward in recipe.reward] == [1.0, 2.0]
    assert recipe.reward[1].model == "rm"
    with pytest.raises(InputError, match=r"reward\.1\.wieght; did you mean weight"):
        parse_recipe(several.replace("weight", "wieght"), where="r", folder=tmp_path)
    with pytest.raises(InputError, match=r"unknown key reward\.modle; did you mean model"):
        parse_recipe(MINIMAL, where="r", folder=tmp_path, overrides=["reward.modle=x"])
    with pytest.raises(InputError, match=r"5 in reward\.5\.weight is not an entry"):
        parse_recipe(several, where="r", folder=tmp_path, overrides=["reward.5.weight=2"])
    with pytest.raises(InputError, match="each of several rewards"):
        parse_recipe(several.replace("{model: rm, weight: 3}", "{}"), where="r", folder=tmp_path)
    with pytest.raises(InputError, match="a url needs a name"):
        parse_recipe(several.replace("model: rm", "url: 'http://localhost:1'"), where="r", folder=tmp_path)


def test_gold_rewards_have_names(tmp_path):
    (tmp_path / "judges" / "strict" / "model").mkdir(parents=True)
    given = '[{function: "judges:helpful"}, {model: judges/strict/model}, {model: org/judge-2, name: second}]'
    recipe = parse(MINIMAL, f"evaluation.gold={given}", folder=tmp_path)
    assert [gold.label for gold in recipe.evaluation.gold] == ["helpful", "strict", "second"]
    assert recipe.evaluation.gold[1].model == str(tmp_path / "judges" / "strict" / "model")
    for wrong, message in (
        ('[{function: "a:f"}, {function: "b:f"}]', "two gold rewards are called f"),
        ('[{function: "rewards:score"}]', "gold reward score is trained on"),
        ("[{name: empty}]", "give one of model, function and url"),
        ('[{name: "../x", function: "a:f"}]', "use letters"),
        ('[{nmae: x, function: "a:f"}]', "did you mean name"),
    ):
        with pytest.raises(InputError, match=message):
            parse(MINIMAL, f"evaluation.gold={wrong}")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("reward={url: 'http://host/score?api_key=s3cr3t', name: judge}", "holds a query"),
        ("reward={url: 'http://me:s3cr3t@host/score', name: judge}", "holds a user name or password"),
        ("reward={url: 'http://host', name: judge, api_key_variable: sk-s3cr3t-0123456789}", "perhaps a key"),
        ("reward={function: 'rewards:score', api_token: s3cr3t}", "unknown key reward.api_token"),
        ("evaluation.gold=[{url: 'http://host/#s3cr3t', name: judge}]", "holds a query"),
        ("rollouts.endpoint={url: 'https://s3cr3t@host/v1', model: m}", "holds a user name or password"),
        ("rollouts.endpoint={url: 'http://host/v1', model: m, api_key_variable: hf_s3cr3t0123456789}", "perhaps a key"),
        ("policy.hf_token=s3cr3t", "unknown key policy.hf_token"),
        ("training.rloo={hub_token: s3cr3t}", "hub_token is a secret"),
        ("training.offline={push_to_hub_token: s3cr3t}", "push_to_hub_token is a secret"),
        ("training.rloo={model_init_kwargs: {token: s3cr3t}}", "token is a secret"),
        ("training.rloo={callbacks: [{api_key: s3cr3t}]}", "api_key is a secret"),
        ("training.lora={password: s3cr3t}", "password is a secret"),
    ],
)
def test_a_recipe_holds_no_keys(override, message):
    """It is stored with its run, and passed on."""
    with pytest.raises(InputError, match=message) as caught:
        parse(MINIMAL, override)
    assert "s3cr3t" not in str(caught.value)


def test_tokens_of_a_tokenizer_are_no_keys():
    settings = {"eos_token": "</s>", "pad_token": "<pad>", "hub_token": None, "max_new_tokens": 4}
    assert parse(MINIMAL, f"training.rloo={settings}".replace("None", "null")).training.rloo == settings
