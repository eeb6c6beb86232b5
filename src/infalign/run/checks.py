"""Everything about a recipe that can be checked before anything is computed, and the plan in words."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from infalign._io.http import Endpoint
from infalign._io.hub import require_model
from infalign._io.wording import counted, first_line
from infalign.errors import InputError, StorageError
from infalign.procedures.measured import MeasuredProcedure
from infalign.rewards.rehearsal import rehearse
from infalign.rewards.score import column_names
from infalign.rewards.source import FunctionReward
from infalign.rollouts.adapters import is_adapter, num_outputs
from infalign.rollouts.embeddings import require_embeddings
from infalign.rollouts.moved import adapter_base
from infalign.rollouts.prompts import Prompt, read_rows
from infalign.rollouts.rendering import reads_the_clock, require_chat_template
from infalign.rollouts.template_errors import explaining
from infalign.rollouts.tokens import excerpt
from infalign.run.inputs import split_prompts
from infalign.run.recipe import Recipe, Reward, named_transform, num_kept, transform_name
from infalign.run.rewards import open_reward
from infalign.theory.optimal import optimal_transform
from infalign.theory.plan import optimum_at_kl
from infalign.theory.tilt import TiltedPolicy
from infalign.training.lora_check import check_lora, testbed_skeleton
from infalign.training.methods import transform_method
from infalign.training.mixture import LARGEST_IDEAL_WEIGHT, ideal_weight
from infalign.training.offline import check_offline
from infalign.training.online import check_training
from infalign.training.running import refuse_adapter

FEWEST_TO_FIT_ON = 8  # prompts: with fewer a reshaping would be fitted to noise


def check_recipe(recipe: Recipe, out: Path) -> dict[str, Any]:
    """Check files, columns, models, prompt lengths, the reward, the training's settings and the output folder.

    Args:
        recipe: The experiment.
        out: Its run folder.

    Returns:
        `text`: the plan in words; and its numbers.

    Raises:
        InputError: Saying what cannot work, where, with a hint.
        StorageError: If the output folder cannot be written.
    """
    check_writable(out)
    if recipe.measured_procedure is None:
        plan_transforms(recipe)
    _check_testbed_data(recipe)
    prompts = _check_prompts(recipe)
    if recipe.measured_procedure is not None:
        _check_decoder(recipe.measured_procedure, prompts)
    policy = None if recipe.policy.model is None else check_policy(recipe, prompts)
    if policy is None and recipe.training.lora is not None:
        check_lora(recipe.training.lora, testbed_skeleton())
    check_reward(recipe, prompts)
    _check_training(recipe)
    return _plan_text(recipe, out, len(prompts) or None, policy)


def _trains(recipe: Recipe) -> tuple[bool, bool]:
    """Whether anything of the recipe is trained by the online solver, and whether anything is on stored rollouts."""
    own = recipe.training.solver == "online"
    others = [one.online for one in recipe.comparators]
    return own or any(others), not own or not all(others)


def _check_training(recipe: Recipe) -> None:
    """Refuse settings that a method of the recipe would stumble over."""
    training = recipe.training
    online, offline = _trains(recipe)
    for used, name, given in ((online, "rloo", training.rloo), (offline, "offline", training.offline)):
        if given and not used:
            raise InputError(
                f"nothing in this recipe takes these settings ({', '.join(given)}): the solver is {training.solver}",
                where=f"training.{name}",
                hint=f"Remove them, or use training.{'offline' if name == 'rloo' else 'rloo'}",
            )
    for method in recipe.comparators:
        method.require_references(recipe.rollouts.num_ref)
    if online:
        settings = {key: value for key, value in training.online.items() if key != "keep_checkpoints"}
        check_training(max_new_tokens=recipe.rollouts.max_new_tokens, **settings)
    if len(recipe.reward) > 1 and any(one.single_reward for one in recipe.comparators):
        raise InputError(
            "a comparator on raw rewards needs one reward: several have no common scale",
            where="compare_with",
            hint="Leave it out, or give one reward",
        )
    widths = {1} if training.solver != "online" else set()
    widths |= {one.rollouts_per_example for one in recipe.comparators if not one.online}
    for width in widths:
        check_offline(
            steps=training.steps,
            examples_per_step=training.prompts_per_step * training.num_generations // width,
            learning_rate=training.learning_rate,
            lora=training.lora,
            trainer=training.offline,
        )


def check_writable(out: Path) -> None:
    """Refuse an output folder that cannot be written.

    Raises:
        StorageError: If it cannot.
    """
    existing = out
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise StorageError("this folder cannot be written", where=str(out), hint="Choose another with --out")


def plan_transforms(recipe: Recipe) -> tuple[float, list[dict[str, Any]]]:
    """The planned KL in nats, and every transform with the β that theory gives it at that KL.

    Raises:
        InputError: If a transform's file is not usable, or a transform cannot reach the KL.
        StorageError: If a transform's file cannot be read.
    """
    procedure, own = recipe.target_procedure, named_transform(recipe.transform)
    planned: list[dict[str, Any]] = []
    try:
        if recipe.beta is None:
            assert recipe.kl_budget is not None, "held by the recipe"
            kl = recipe.kl_budget
        elif own is None:
            kl = optimal_transform(procedure, beta=recipe.beta).kl
        else:
            kl = TiltedPolicy(own, beta=recipe.beta).kl
        weight = planned_weight(recipe, kl)
        for number, wanted in enumerate(recipe.transforms):
            share = weight if number == 0 else 1.0
            method, beta = transform_method(transform_name(wanted), named_transform(wanted), procedure, kl, share)
            entry = {"name": method.name, **method.to_dict(), "beta": beta}
            if share < 1.0:
                entry |= {"name": f"{entry['name']}-mixture", "mixture_weight": share}
            planned.append(entry)
    except InputError as error:
        if recipe.beta is None or error.where != "kl_budget":
            raise
        raise InputError(
            f"this KL coefficient cannot be planned with ({error.what})",
            where=f"beta {recipe.beta:g}",
            hint="Choose another, or give kl_budget",
        ) from error
    return kl, planned


def planned_weight(recipe: Recipe, kl: float) -> float:
    """The share that the recipe's own transform has in the mixture it is trained in (M19); 1 where there is none."""
    mixture = recipe.training.mixture
    if isinstance(mixture, str):
        return 1.0
    if mixture.weight != "auto":
        return mixture.weight
    weight = ideal_weight(optimum_at_kl(recipe.target_procedure, kl))
    if weight <= LARGEST_IDEAL_WEIGHT:
        return weight
    if transform_name(recipe.transform) in map(transform_name, recipe.transforms[1:]):
        raise InputError(
            f"the optimum for {recipe.target_procedure.label} is not a mixture with the reference: training inside one "
            f"gains nothing, and {transform_name(recipe.transform)} would be trained twice",
            where="training.mixture",
            hint="Leave training.mixture out, or compare_with the same transform",
        )
    return 1.0


def check_policy(recipe: Recipe, prompts: Sequence[Prompt]) -> dict[str, Any]:
    """Load the policy's configuration and tokenizer (no weights) and measure every prompt against its context.

    Raises:
        InputError: If there is no model or tokenizer, a chat template is needed and missing, or a prompt is too long.
    """
    from transformers import AutoModelForCausalLM

    from infalign.rollouts.models import load_tokenizer
    from infalign.rollouts.tokens import prompt_token_ids

    model = recipe.policy.model
    assert model is not None  # the caller checked
    where = f"policy.model {model}"
    if (Path(model) / "adapter_config.json").is_file():
        refuse_adapter(model)
    config = _model_config(model, where, trust_remote_code=recipe.policy.trust_remote_code)
    _check_weights(model, where, allow_pickle=recipe.policy.allow_pickle, setting="policy.allow_pickle")
    tokenizer = load_tokenizer(model, trust_remote_code=recipe.policy.trust_remote_code)
    if recipe.rollouts.endpoint is not None and reads_the_clock(tokenizer) and any(
        not isinstance(prompt.prompt, str) for prompt in prompts
    ):  # fmt: skip
        raise InputError(
            "its chat template writes the date, which a server would render at another moment than training does",
            where=where,
            hint="Write a fixed date into the chat template, here and at the server, or draw without rollouts.endpoint",
        )
    size = getattr(config.get_text_config(), "vocab_size", None)
    end: Any = tokenizer.eos_token_id
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    new = recipe.rollouts.max_new_tokens
    longest = 0
    for prompt, ids in zip(prompts, prompt_token_ids(tokenizer, prompts), strict=True):
        longest = max(longest, len(ids))
        require_embeddings([[*ids, end]], size, where, tokenizer=tokenizer, what="prompt and response")
        if context is not None and len(ids) + new > context:
            raise InputError(
                f"prompt {prompt.id} has {counted(len(ids), 'token')}; with rollouts.max_new_tokens={new} it "
                f"does not fit the model's context of {context}: {excerpt(prompt.prompt)}",
                where="prompts",
                hint="Shorten or remove such prompts, set prompts.max_characters, or lower rollouts.max_new_tokens",
            )
    import torch

    with torch.device("meta"):
        try:
            skeleton = AutoModelForCausalLM.from_config(config, trust_remote_code=recipe.policy.trust_remote_code)
        except ValueError as error:
            raise InputError(
                f"this is not a causal language model ({first_line(error)})", where=where, hint="Give one"
            ) from error
    found = {"parameters": skeleton.num_parameters(), "context": context, "longest_prompt": longest}
    if recipe.training.lora is not None:
        check_lora(recipe.training.lora, skeleton)
    return found


def check_reward(recipe: Recipe, prompts: Sequence[Prompt]) -> None:
    """Make sure that reward functions can be called, and that reward models can score these prompts; gold ones too.

    Raises:
        InputError: If it cannot.
    """
    _check_keys(recipe)
    for number, reward in enumerate(recipe.reward):
        _check_one_reward(reward, prompts, "reward" if len(recipe.reward) == 1 else f"reward.{number}")
    for gold in recipe.evaluation.gold:
        _check_one_reward(gold, prompts, f"evaluation.gold {gold.label}")


def _check_keys(recipe: Recipe) -> None:
    """Make sure that the keys of the servers that the recipe names are there and can be sent."""
    served = [*recipe.reward, *recipe.evaluation.gold, recipe.rollouts.endpoint]
    for one in served:
        if one is not None and one.url is not None:
            Endpoint(one.url, api_key_variable=one.api_key_variable).key()


def _check_one_reward(reward: Reward, prompts: Sequence[Prompt], setting: str) -> None:
    if reward.function is not None:
        names = [*column_names(prompts), "prompt_id"]
        function = FunctionReward(reward.function)
        function.require_columns(names)
        rehearse(function, prompts, f"reward function {reward.function}")
    elif reward.url is not None:
        rehearse(open_reward(reward), prompts, f"{setting}.url {reward.url}")
    elif reward.model is not None:
        from transformers import AutoTokenizer

        where = f"{setting}.model {reward.model}"
        base = adapter_base(reward.model)
        config = _model_config(base, where, trust_remote_code=reward.trust_remote_code)
        outputs = config.num_labels
        if is_adapter(reward.model):  # the head is the adapter's, whatever its base's configuration says
            outputs = num_outputs(reward.model, allow_pickle=reward.allow_pickle) or outputs
            _check_weights(base, where, allow_pickle=reward.allow_pickle, setting=f"{setting}.allow_pickle")
        if outputs != 1:
            raise InputError(f"the model has {counted(outputs, 'output')}", where=where, hint="A reward model has one")
        _check_weights(reward.model, where, allow_pickle=reward.allow_pickle, setting=f"{setting}.allow_pickle")
        try:
            tokenizer = AutoTokenizer.from_pretrained(reward.model, trust_remote_code=reward.trust_remote_code)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"no tokenizer can be loaded ({first_line(error)})",
                where=where,
                hint="Save the tokenizer into the same folder (tokenizer.save_pretrained)",
            ) from error
        size = getattr(config.get_text_config(), "vocab_size", None)
        for prompt in prompts:
            if isinstance(prompt.prompt, str):
                ids = tokenizer(prompt.prompt, verbose=False)["input_ids"]
                require_embeddings([ids], size, where, tokenizer=tokenizer, what=f"a prompt ({prompt.id})")
                continue
            require_chat_template(tokenizer)
            with explaining(tokenizer):
                tokenizer.apply_chat_template([*prompt.prompt, {"role": "assistant", "content": "…"}], tokenize=False)


def _model_config(model: str, where: str, *, trust_remote_code: bool) -> Any:
    from transformers import AutoConfig

    require_model(model, where)
    try:
        return AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"no model can be read there ({first_line(error)})",
            where=where,
            hint="Give a Hugging Face model folder or a hub name",
        ) from error


def _check_weights(model: str, where: str, *, allow_pickle: bool, setting: str) -> None:
    """Refuse a local folder without weights, with pickled ones, or with damaged ones; no weights are read."""
    from safetensors import SafetensorError, safe_open

    folder = Path(model)
    if not folder.is_dir():
        return
    files = sorted(folder.glob("*.safetensors"))
    pickled = sorted(path.name for ending in ("*.bin", "*.pt", "*.pth") for path in folder.glob(ending))
    if not files and pickled and not allow_pickle:
        raise InputError(
            f"the weights are not safetensors but {pickled[0]}, which can run code when it is read",
            where=where,
            hint=f"Convert them (save_pretrained writes safetensors), or set {setting}: true if you trust them",
        )
    if not files and not pickled:
        raise InputError("there are no weights in this folder", where=where, hint="It should hold model.safetensors")
    for path in files:
        try:
            with safe_open(path, framework="numpy"):
                pass
        except (OSError, SafetensorError) as error:
            raise InputError(f"{path.name} is damaged ({error})", where=where, hint="Copy or save it again") from error


def _check_testbed_data(recipe: Recipe) -> None:
    testbed = recipe.testbed
    if testbed is None:
        return
    if testbed.demonstrations is not None:
        rows = testbed.demonstrations
        read_rows(rows.source, columns=[rows.prompt, rows.completion], split=rows.split, limit=1)
    for rows in testbed.preferences:
        read_rows(rows.source, columns=[rows.prompt, rows.chosen, rows.rejected], split=rows.split, limit=1)


def _check_prompts(recipe: Recipe) -> list[Prompt]:
    if recipe.prompts.source is None:
        return []
    train, evaluation = split_prompts(recipe)
    prompts = [*train, *evaluation]
    kept = num_kept(recipe, len(train))
    if recipe.reshape.kind != "none" and kept < FEWEST_TO_FIT_ON:
        raise InputError(
            f"training keeps only {counted(kept, 'prompt')} aside, and a reshaping is fitted on those",
            where="reshape",
            hint=f"Give at least {4 * FEWEST_TO_FIT_ON} training prompts, or reshape: none",
        )
    return prompts


def _check_decoder(procedure: MeasuredProcedure, prompts: Sequence[Prompt]) -> None:
    """Refuse a decoder's function or proxy that is not there or cannot be called.

    Raises:
        InputError: If it is so.
    """
    from infalign.select.black_box import decoder_function

    if procedure.function is not None:
        decoder_function(procedure.function)
    elif procedure.proxy is not None and ":" in procedure.proxy and not Path(procedure.proxy).exists():
        proxy = FunctionReward(procedure.proxy)
        proxy.require_columns([*column_names(prompts), "prompt_id"])
        rehearse(proxy, prompts, f"procedure.decoder.proxy {procedure.proxy}")
    elif procedure.proxy is not None:
        _model_config(procedure.proxy, f"procedure.decoder.proxy {procedure.proxy}", trust_remote_code=False)


def _procedure_label(recipe: Recipe) -> str:
    measured = recipe.measured_procedure
    return recipe.target_procedure.label if measured is None else f"{measured.label}, to be measured"


def _plan_text(recipe: Recipe, out: Path, prompts: int | None, policy: dict[str, Any] | None) -> dict[str, Any]:
    transforms = [transform_name(t) for t in recipe.transforms]
    comparators = [one.name for one in recipe.comparators]
    names = [*transforms, *comparators]
    training, rollouts, evaluation = recipe.training, recipe.rollouts, recipe.evaluation
    reference_rollouts = recipe.prompts.train * rollouts.num_ref
    training_rollouts = _rollouts_drawn_in_training(recipe)
    per_model = f"{counted(training.steps, 'step')} of {training.prompts_per_step} × {training.num_generations}"
    _, stored = _trains(recipe)
    evaluation_rollouts = recipe.prompts.evaluation * evaluation.num_samples * (len(names) + 1)
    lines = [
        f"Recipe {recipe.name}, run folder {out}",
        f"Procedure: {_procedure_label(recipe)}; transforms: {', '.join(transforms)}; "
        + (f"comparators: {', '.join(comparators)}; " if comparators else "")
        + (f"KL budget {recipe.kl_budget} nats" if recipe.kl_budget is not None else f"beta {recipe.beta}"),
    ]
    if recipe.testbed is not None:
        lines.append("Testbed: a reference policy and a reward model are trained from scratch first")
    if prompts is not None:
        wanted = recipe.prompts
        lines.append(f"Prompts: {prompts}, of up to {wanted.train} to train on and {wanted.evaluation} to evaluate")
    lines += [
        f"Reference rollouts: up to {counted(recipe.prompts.train, 'prompt')} × {rollouts.num_ref} = "
        f"{reference_rollouts:,}",
        f"Training ({training.solver}): {len(names)} × {per_model}"
        + (
            f" rollouts; {training_rollouts:,} are drawn for it, the others are stored ones"
            if stored
            else f" = {counted(training_rollouts, 'rollout')}"
        ),
        f"Evaluation: {counted(len(names) + 1, 'model')} × up to {counted(recipe.prompts.evaluation, 'prompt')} "
        f"× {evaluation.num_samples} = {counted(evaluation_rollouts, 'rollout')}",
    ]
    numbers: dict[str, Any] = {
        "reference_rollouts": reference_rollouts,
        "training_rollouts": training_rollouts,
        "evaluation_rollouts": evaluation_rollouts,
    }
    if policy is not None:
        numbers |= policy
        lines.append(
            f"Policy: {counted(policy['parameters'], 'parameter')}, longest prompt "
            f"{counted(policy['longest_prompt'], 'token')}"
        )
        # Weights, gradients and two Adam moments in 32 bits, and the frozen reference beside them.
        copies = 2.2 if training.lora is not None else 5
        numbers["training_memory_gib"] = round(copies * 4 * policy["parameters"] / 2**30, 2)
        mebibytes = copies * 4 * policy["parameters"] / 2**20
        size = f"{mebibytes / 1024:.1f} GiB" if mebibytes > 1024 else f"{mebibytes:.1f} MiB"
        lines.append(f"Training memory before activations: about {size} in 32-bit numbers")
    return {"text": "\n".join(lines), **numbers}


def _rollouts_drawn_in_training(recipe: Recipe) -> int:
    """How many rollouts all trainings draw: none on stored rollouts, but for the mixed solver's rounds."""
    training = recipe.training
    online = sum(one.online for one in recipe.comparators)
    batches = training.steps * online
    if training.solver == "online":
        batches += training.steps * len(recipe.transforms)
    elif training.solver == "mixed":  # one round for every window of steps but the first
        batches += (training.steps - 1) // training.refresh_every * len(recipe.transforms)
    return batches * training.prompts_per_step * training.num_generations
