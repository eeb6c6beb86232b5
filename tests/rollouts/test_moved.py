"""Files that name models by a path still find them when the run folder has been moved."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model

from infalign.errors import InfalignError
from infalign.rollouts.key import model_fingerprint
from infalign.rollouts.models import load_policy
from infalign.rollouts.moved import adapter_base
from infalign.rollouts.opening import open_policies, open_policy
from infalign.rollouts.policy_file import MIXTURE, PolicyFile, write_policy_file
from infalign.run.testbed.quiet import quiet
from infalign.run.testbed.toy import random_llama

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")


def make_run(run, base):
    """A run folder with an adapter on `base`, and a mixture of the two."""
    model, tokenizer = load_policy(base)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.fill_(0.1)
    folder = run / "policies" / "optimal" / "model"
    with quiet():
        adapted.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    (run / "run.json").write_text("{}")
    write_policy_file(
        run / "policies" / "optimal" / "reshaped",
        PolicyFile(MIXTURE, str(base), (str(folder),), {"weights": [0.5]}),
    )
    return folder


def scores(policy):
    prompts, responses = [[5, 6], [7]], [[8, 9], [10, 1]]
    return policy.logprobs(prompts, responses).tolist()


@pytest.mark.parametrize("where", ["in the run", "given by its recipe"])
def test_a_moved_run_opens_its_adapter_and_its_mixture(tmp_path, where):
    run = tmp_path / "before" / "run"
    base = run / "models" / "reference" if where == "in the run" else tmp_path / "before" / "base"
    random_llama(base, seed=4)
    folder = make_run(run, base)
    print_before, scores_before = model_fingerprint(folder), scores(open_policy(folder))
    reshaped_before = scores(open_policy(folder.parent / "reshaped"))
    if where == "in the run":
        (tmp_path / "before").rename(tmp_path / "after")
        moved = tmp_path / "after" / "run"
    else:
        moved = tmp_path / "else" / "where" / "run"
        moved.parent.mkdir(parents=True)
        run.rename(moved)
        base.rename(tmp_path / "base")
        (moved / "recipe.json").write_text(json.dumps({"policy": {"model": str(tmp_path / "base")}}))
    now = moved / "policies" / "optimal" / "model"
    assert model_fingerprint(now) == print_before
    assert scores(open_policy(now)) == pytest.approx(scores_before, abs=1e-5)
    assert scores(open_policy(moved / "policies" / "optimal" / "reshaped")) == pytest.approx(reshaped_before, abs=1e-5)
    aligned, reference = open_policies([now, adapter_base(now)])
    assert aligned.model is reference.model, "one base in memory"
    assert scores(aligned) == pytest.approx(scores_before, abs=1e-5)


@pytest.mark.parametrize("content", ["{", "[1]", "{}", '{"base_model_name_or_path": 3}'])
def test_a_damaged_adapter_config_is_named(tmp_path, content):
    random_llama(tmp_path / "model")
    (tmp_path / "model" / "adapter_config.json").write_text(content)
    for use in (open_policy, load_policy, model_fingerprint):
        with pytest.raises(InfalignError, match=r"adapter_config\.json: .*\. [A-Z]"):
            use(tmp_path / "model")
