"""The experiment as one typed YAML file.

Unknown keys are refused with a suggestion; relative paths are relative to the recipe's own folder.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from infalign.errors import InputError, StorageError
from infalign.measured_procedure import MeasuredProcedure
from infalign.procedures import InferenceProcedure, procedure_from_dict
from infalign.recipe_baselines import baseline_name, baseline_value
from infalign.transforms import Exponential, Identity, Log, RewardTransform

_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"  # can be a folder
_SHORT_PROCEDURE = re.compile(r"^(best-of|worst-of)-(\d+)$")


def _procedure_dict(value: Any) -> Any:
    """`best-of-4` for `{kind: best-of-n, n: 4}`; anything else as it is."""
    if isinstance(value, str):
        short = _SHORT_PROCEDURE.match(value)
        value = {"kind": f"{short[1]}-n", "n": int(short[2])} if short else {"kind": value}
    if not isinstance(value, Mapping) or "kind" not in value:
        raise ValueError("a procedure is written best-of-4, worst-of-4, standard, or {kind: best-of-n, n: 4}")
    if value["kind"] == "fitted" and "decoder" in value:
        MeasuredProcedure.parse(value)
    else:
        procedure_from_dict(dict(value))
    return dict(value)


def _transform_value(value: Any) -> Any:
    """`optimal`, `self-consistent`, `identity`, `log`, `{exponential: t}` or `{file: transform.json}`."""
    if isinstance(value, str) and value in {"optimal", "self-consistent", "identity", "log"}:
        return value
    if isinstance(value, Mapping) and len(value) == 1:
        (kind, argument), *_ = value.items()
        if kind == "exponential" and isinstance(argument, int | float | str) and not isinstance(argument, bool):
            return {"exponential": _exponent(argument)}
        if kind == "file" and isinstance(argument, str):
            return {"file": argument}
    raise ValueError(
        "a transform is one of: optimal, self-consistent, identity, log, {exponential: t}, {file: transform.json}"
    )


def _compared_value(value: Any) -> Any:
    """A transform, or a baseline: `{baseline: raw}`."""
    return baseline_value(value) if isinstance(value, Mapping) and "baseline" in value else _transform_value(value)


def _exponent(value: float | str) -> float:
    """A finite number; also from text, for to YAML 1e2 is text."""
    try:
        return Exponential(float(value)).t
    except InputError as error:
        raise ValueError(error.what) from error
    except ValueError as error:
        raise ValueError(f"t = {value!r} is not a number") from error


Procedure = Annotated[dict[str, Any], BeforeValidator(_procedure_dict)]
Transform = Annotated[str | dict[str, Any], BeforeValidator(_transform_value)]
Compared = Annotated[str | dict[str, Any], BeforeValidator(_compared_value)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(gt=0, lt=1)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class Rows(_Section):
    """Where rows of text come from: JSONL, JSONL.gz, Parquet, or a hub data set."""

    source: str
    split: str | None = None
    limit: Count | None = None
    max_characters: Count | None = None  # rows with a longer prompt are left out
    prompt: str = "prompt"
    completion: str = "completion"
    chosen: str = "chosen"
    rejected: str = "rejected"


class TinyReference(_Section):
    """Size and training of a reference policy trained from scratch; what is left out takes the testbed's default."""

    vocab_size: Count | None = None
    hidden_size: Count | None = None
    num_layers: Count | None = None
    num_heads: Count | None = None
    max_length: Count | None = None
    epochs: Count | None = None
    batch_size: Count | None = None
    learning_rate: Positive | None = None


class TinyReward(_Section):
    """Training of a tiny reward model, and its size if not the reference's; what is left out takes the default."""

    hidden_size: Count | None = None
    num_layers: Count | None = None
    num_heads: Count | None = None
    max_length: Count | None = None
    epochs: Count | None = None
    batch_size: Count | None = None
    learning_rate: Positive | None = None


class Testbed(_Section):
    """Train a tiny reference policy and reward model first; `corpus: docstrings` needs no data at all."""

    corpus: Literal["docstrings"] | None = None
    demonstrations: Rows | None = None
    preferences: list[Rows] = []
    held_out: Share = 0.1
    reference: TinyReference = TinyReference()
    reward_model: TinyReward = TinyReward()

    @model_validator(mode="after")
    def _one_corpus(self) -> Testbed:
        if (self.corpus is None) == (self.demonstrations is None or not self.preferences):
            raise ValueError("give either corpus: docstrings, or both demonstrations and preferences")
        return self


class Policy(_Section):
    """The reference policy, where alignment starts."""

    model: str | None = None
    trust_remote_code: bool = False
    allow_pickle: bool = False


class Reward(_Section):
    """What scores a response: a sequence-classification model, a Python function `module:function`, or a server.

    A server gets `{"prompts": [...], "completions": [...]}` and answers `{"rewards": [...]}`; `name` stands for what it
    scores with, so give another one when that changes.
    """

    model: str | None = None
    function: str | None = None
    url: str | None = None
    name: str | None = None
    api_key_variable: str | None = None  # the environment variable that holds the server's key
    weight: Positive = 1.0  # among several rewards, each on its own quantile scale
    batch_size: Count = 64
    max_length: Count | None = None
    trust_remote_code: bool = False
    allow_pickle: bool = False

    @model_validator(mode="after")
    def _one_source(self) -> Reward:
        if sum(source is not None for source in (self.model, self.function, self.url)) > 1:
            raise ValueError("give one of model, function and url")
        if self.url is not None and self.name is None:
            raise ValueError("a url needs a name: it tells stored rewards of one server version from another's")
        if self.url is None and (self.name is not None or self.api_key_variable is not None):
            raise ValueError("name and api_key_variable belong to a url")
        return self

    @property
    def given(self) -> bool:
        """Whether it names a source; only a testbed can do without."""
        return self.model is not None or self.function is not None or self.url is not None


def _as_list(value: Any) -> Any:
    """One reward for a list of one."""
    return value if isinstance(value, list) else [value]


Rewards = Annotated[list[Reward], BeforeValidator(_as_list), Field(min_length=1)]


class GoldReward(Reward):
    """A reward that training never saw and that only judges; named after its model or function if not given a name."""

    name: Annotated[str, Field(pattern=_NAME)] | None = None

    @model_validator(mode="after")
    def _one_source(self) -> GoldReward:
        if sum(source is not None for source in (self.model, self.function, self.url)) != 1:
            raise ValueError("give one of model, function and url")
        if self.url is not None and self.name is None:
            raise ValueError("a url needs a name: it tells stored rewards of one server version from another's")
        return self

    @property
    def label(self) -> str:
        """Its name; `module:grade` is called grade, and a model by its folder."""
        if self.name is not None:
            return self.name
        folder = Path(self.model or "")
        source = folder.parent.name if folder.name == "model" else folder.name  # policies/NAME/model
        if self.function is not None:
            source = self.function.partition(":")[2]
        return re.sub(r"[^A-Za-z0-9._-]+", "-", source).strip("-._") or "gold"


class Prompts(_Section):
    """Prompts to train on, and prompts kept apart for evaluation."""

    source: str | None = None
    split: str | None = None
    column: str = "prompt"
    train: Count = 512
    evaluation: Count = 128
    held_out: Share = 0.2
    max_characters: Count | None = None  # longer prompts are left out, and counted
    evaluation_source: str | None = None


class RolloutEndpoint(_Section):
    """An OpenAI-compatible server of the reference policy (vLLM, SGLang …) that draws its rollouts."""

    url: str  # ends before /completions, usually in /v1
    model: str  # its name there; give another when the server serves other weights
    api_key_variable: str | None = None  # the environment variable that holds the key
    concurrency: Count = 16


class Rollouts(_Section):
    """Reference rollouts used to calibrate."""

    num_ref: Annotated[int, Field(ge=2)] = 64
    max_new_tokens: Count = 128
    batch_size: Count | None = None
    endpoint: RolloutEndpoint | None = None

    @property
    def identity(self) -> dict[str, Any]:
        """What the rollouts depend on, and nothing of how fast or from where they come."""
        served = None if self.endpoint is None else self.endpoint.model
        return {"num_ref": self.num_ref, "max_new_tokens": self.max_new_tokens, "served": served}


class Calibration(_Section):
    """How scores become quantiles."""

    ties: Literal["midrank", "strict", "inclusive", "random"] = "midrank"


class Training(_Section):
    """How the policy is trained; `rloo` takes any further field of TRL's RLOOConfig, `offline` of TrainingArguments."""

    solver: Literal["online", "offline-regression", "weighted-likelihood", "mixed"] = "online"

    steps: Count = 200
    prompts_per_step: Count = 16
    num_generations: Count = 16
    learning_rate: Positive = 1e-5
    baseline: Literal["known", "leave-one-out"] = "known"
    lora: dict[str, Any] | None = None
    save_steps: Count = 25
    keep_checkpoints: bool = False  # for `infalign evaluate --run RUN --checkpoints`
    refresh_every: Annotated[int, Field(ge=2)] = 10  # steps between fresh rollouts; for solver: mixed
    rloo: dict[str, Any] = {}
    offline: dict[str, Any] = {}

    @property
    def online(self) -> dict[str, Any]:
        """What the online solver takes."""
        return self.model_dump(exclude={"solver", "refresh_every", "offline"})


class Evaluation(_Section):
    """Fresh rollouts of every model on held-out prompts."""

    num_samples: Annotated[int, Field(ge=2)] = 32
    procedures: Annotated[list[Procedure], Field(min_length=1)] = [
        {"kind": "standard"},
        {"kind": "best-of-n", "n": 4},
        {"kind": "worst-of-n", "n": 4},
    ]
    gold: list[GoldReward] = []
    confidence: Share = 0.95

    @model_validator(mode="after")
    def _names_differ(self) -> Evaluation:
        names = [gold.label for gold in self.gold]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise ValueError(f"two gold rewards are called {repeated[0]}; give each its own name")
        return self


class Recipe(_Section):
    """One experiment. See `recipes/` for worked examples."""

    name: str = Field(pattern=_NAME)  # it names the run folder
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    testbed: Testbed | None = None
    policy: Policy = Policy()
    reward: Rewards = [Reward()]  # one, or a list of several that are combined after calibration
    prompts: Prompts = Prompts()
    procedure: Procedure = {"kind": "best-of-n", "n": 4}
    rollouts: Rollouts = Rollouts()
    calibration: Calibration = Calibration()
    transform: Transform = "optimal"
    compare_with: list[Compared] = ["identity"]
    beta: Positive | None = None
    kl_budget: Positive | None = None
    training: Training = Training()
    evaluation: Evaluation = Evaluation()

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        if (self.beta is None) == (self.kl_budget is None):
            raise ValueError("give exactly one of beta and kl_budget")
        if len(self.reward) > 1 and not all(reward.given for reward in self.reward):
            raise ValueError("each of several rewards needs its model, function or url")
        if self.testbed is None:
            for section, given in (
                ("policy.model", self.policy.model),
                ("reward.model, reward.function or reward.url", self.reward[0].given or None),
                ("prompts.source", self.prompts.source),
            ):
                if given is None:
                    raise ValueError(f"{section} is missing (only a recipe with a testbed can do without)")
        elif self.testbed.corpus is None and self.prompts.source is None:
            raise ValueError("prompts.source is missing (only the docstrings testbed brings its own prompts)")
        if any("decoder" in p for p in self.evaluation.procedures):
            raise ValueError("a decoder can only be the recipe's own procedure, not one of evaluation.procedures")
        if self.measured_procedure is not None and len(self.reward) > 1:
            raise ValueError("a procedure with a decoder is measured by one reward, not by several")
        needed = max((procedure_from_dict(p).n or 1) for p in self.evaluation.procedures)
        if self.evaluation.num_samples < needed:
            raise ValueError(
                f"evaluation.num_samples is {self.evaluation.num_samples}, but its procedures draw up to {needed}"
            )
        trained = [(one.model, one.function, one.url) for one in self.reward if one.given]
        for gold in self.evaluation.gold:
            if (gold.model, gold.function, gold.url) in trained:
                raise ValueError(f"the gold reward {gold.label} is trained on, so it tells nothing new")
        names = [*map(transform_name, self.transforms), *map(baseline_name, self.baselines)]
        if len(set(names)) != len(names):
            raise ValueError(f"compare_with repeats a transform: {', '.join(names)}")
        if self.training.solver != "online" and "self-consistent" in names:
            raise ValueError(
                f"the self-consistent transform follows the policy's own rollouts; with training.solver "
                f"{self.training.solver} use optimal"
            )
        if "reference" in names:
            raise ValueError("a transform file cannot be called reference: its name names the aligned policy")
        return self

    @property
    def transforms(self) -> list[str | dict[str, Any]]:
        """The recipe's transform and those it is compared with."""
        others = [one for one in self.compare_with if not (isinstance(one, dict) and "baseline" in one)]
        return [self.transform, *others]

    @property
    def baselines(self) -> list[dict[str, Any]]:
        """The baselines it is compared with."""
        return [one for one in self.compare_with if isinstance(one, dict) and "baseline" in one]

    @property
    def measured_procedure(self) -> MeasuredProcedure | None:
        """The decoder whose procedure has yet to be measured; None for a procedure that is known."""
        return MeasuredProcedure.parse(self.procedure) if "decoder" in self.procedure else None

    def with_procedure(self, procedure: InferenceProcedure) -> Recipe:
        """The same recipe for a procedure that is known."""
        return self.model_copy(update={"procedure": procedure.to_dict()})

    @property
    def target_procedure(self) -> InferenceProcedure:
        """The procedure that the model will be used through; a decoder must have been measured first."""
        return procedure_from_dict(self.procedure)

    @property
    def evaluation_procedures(self) -> list[InferenceProcedure]:
        """The procedures evaluated; the target procedure is always among them."""
        procedures = [procedure_from_dict(p) for p in self.evaluation.procedures]
        return procedures if self.target_procedure in procedures else [*procedures, self.target_procedure]


def transform_name(transform: str | Mapping[str, Any]) -> str:
    """A short name that can be a folder: `optimal`, `exponential+10`, `transform`."""
    if isinstance(transform, str):
        return transform
    if "exponential" in transform:
        return f"exponential{transform['exponential']:+g}"
    return Path(transform["file"]).stem


def named_transform(transform: str | Mapping[str, Any]) -> RewardTransform | None:
    """The transform itself; `None` for `optimal` and `self-consistent`, which depend on the procedure."""
    if isinstance(transform, str):
        return {"optimal": None, "self-consistent": None, "identity": Identity(), "log": Log()}[transform]
    if "exponential" in transform:
        return Exponential(transform["exponential"])
    return RewardTransform.load(Path(transform["file"]))


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe, apply `key.path=value` overrides, make its paths absolute, check it.

    Raises:
        StorageError: If the file cannot be read.
        InputError: If it is not YAML, has an unknown key or an unusable value; the message says where.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise StorageError(f"cannot read the recipe ({error})", where=str(path), mend="Check the path") from error
    return parse_recipe(text, where=str(path), folder=path.resolve().parent, overrides=overrides)


class _OneOfEachKey(yaml.SafeLoader):
    """Safe YAML in which a key that comes twice is a mistake, where YAML itself would keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value != "<<":
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        problem=f"the key {key.value} comes twice", problem_mark=key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def _read_yaml(text: str) -> Any:
    return yaml.load(text, Loader=_OneOfEachKey)


def parse_recipe(text: str, *, where: str, folder: Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in `text`; see `load_recipe`."""
    try:
        content = _read_yaml(text)
    except (yaml.YAMLError, ValueError) as error:
        raise InputError(f"not valid YAML ({' '.join(str(error).split())})", where=where) from error
    if not isinstance(content, dict):
        raise InputError("a recipe is a mapping of settings", where=where, mend="See recipes/ for examples")
    for override in overrides:
        _apply_override(content, override)
    try:
        recipe = Recipe.model_validate(content)
    except ValidationError as error:
        raise InputError(_explain(error, content), where=where) from error
    return _with_absolute_paths(recipe, folder)


def _apply_override(content: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key.strip():
        raise InputError(f"{override!r} is not key.path=value", where="--set")
    *parents, last = key.strip().split(".")
    section: Any = content
    for parent in parents:
        section = section[_entry(section, parent, key)] if isinstance(section, list) else section.setdefault(parent, {})
        if not isinstance(section, dict | list):
            raise InputError(f"{parent} in {key} is not a section", where="--set")
    place: Any = _entry(section, last, key) if isinstance(section, list) else last
    try:
        section[place] = _read_yaml(value)
    except (yaml.YAMLError, ValueError) as error:
        raise InputError(f"the value of {key} is not valid YAML: {value!r}", where="--set") from error


def _entry(section: list[Any], number: str, key: str) -> int:
    """An entry of a list by its number, from 0."""
    if not number.isdigit() or int(number) >= len(section):
        raise InputError(
            f"{number} in {key} is not an entry of a list", where="--set", mend=f"Write 0 to {len(section) - 1}"
        )
    return int(number)


def _explain(error: ValidationError, content: Mapping[str, Any]) -> str:
    """The first problem, in words, with a suggestion for an unknown key."""
    first = error.errors()[0]
    location = ".".join(str(part) for part in first["loc"] if not str(part).startswith(("function-", "dict[", "str")))
    if not isinstance(content.get("reward"), list):  # a single reward was not written as a list
        location = location.replace("reward.0", "reward", 1) if location.startswith("reward.0") else location
    if first["type"] == "extra_forbidden":
        key, section = str(first["loc"][-1]), _section_at(first["loc"][:-1])
        close = difflib.get_close_matches(key, section.model_fields, n=1)
        hint = f"did you mean {close[0]}?" if close else f"known keys: {', '.join(section.model_fields)}"
        message = f"unknown key {location}; {hint}"
    else:
        text = first["msg"].removeprefix("Value error, ").removeprefix("procedure: ")
        if first["type"] == "model_type":
            text = f"a section of settings goes here, not {first['input']!r}"
        elif first["type"] == "string_pattern_mismatch":
            text = "use letters, digits, dots, hyphens and underscores, a letter or digit first"
        if text.split()[0][1:].islower():  # a sentence, not the name of a class
            text = text[0].lower() + text[1:]
        message = f"{location}: {text}" if location else text
    more = error.error_count() - 1
    return f"{message} (and {more} more)" if more else message


def _section_at(location: tuple[int | str, ...]) -> type[BaseModel]:
    section: type[BaseModel] = Recipe
    for part in location:
        if isinstance(part, int):
            continue
        for candidate in _models_in(section.model_fields[part].annotation):
            section = candidate
    return section


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in getattr(annotation, "__args__", ()) for model in _models_in(argument)]


def _with_absolute_paths(recipe: Recipe, folder: Path) -> Recipe:
    content = recipe.model_dump()

    def absolute(section: dict[str, Any] | None, key: str) -> None:
        if section and isinstance(section.get(key), str):
            section[key] = _resolve(section[key], folder)

    absolute(content["policy"], "model")
    for reward in content["reward"]:
        absolute(reward, "model")
    for gold in content["evaluation"]["gold"]:
        absolute(gold, "model")
    absolute(content["prompts"], "source")
    absolute(content["prompts"], "evaluation_source")
    if content["testbed"]:
        absolute(content["testbed"]["demonstrations"], "source")
        for rows in content["testbed"]["preferences"]:
            absolute(rows, "source")
    decoder = content["procedure"].get("decoder")
    if isinstance(decoder, dict) and ":" not in decoder.get("proxy", ":"):
        content["procedure"] = {**content["procedure"], "decoder": dict(decoder)}
        absolute(content["procedure"]["decoder"], "proxy")
    for transform in [content["transform"], *content["compare_with"]]:
        if isinstance(transform, dict):
            absolute(transform, "file")
    return Recipe.model_validate(content)


def _resolve(name: str, folder: Path) -> str:
    """A path in the recipe's folder, or the name as it is where nothing is there and it reads as a hub name."""
    path = Path(name).expanduser()
    beside = path if path.is_absolute() else folder / path
    looks_like_hub_name = (
        not path.is_absolute() and not name.startswith(".") and name.count("/") <= 1 and not path.suffix
    )
    return name if looks_like_hub_name and not beside.exists() else str(beside.resolve())
