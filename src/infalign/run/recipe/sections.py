"""The sections of a recipe, each with its settings, their limits and their defaults."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from infalign.run.recipe.values import NAME, Address, Count, Positive, Procedure, Settings, Share, Variable


class Section(BaseModel):
    """Settings that belong together; an unknown one is refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class Rows(Section):
    """Where rows of text come from: JSONL, JSONL.gz, Parquet, or a hub data set."""

    source: str
    split: str | None = None
    limit: Count | None = None
    max_characters: Count | None = None  # rows with a longer prompt are left out
    prompt: str = "prompt"
    completion: str = "completion"
    chosen: str = "chosen"
    rejected: str = "rejected"


class TinyModel(Section):
    """Size and training of a model of the testbed; what is left out takes the testbed's default.

    A reward model of no size of its own has the reference's.
    """

    hidden_size: Count | None = None
    num_layers: Count | None = None
    num_heads: Count | None = None
    max_length: Count | None = None
    epochs: Count | None = None
    batch_size: Count | None = None
    learning_rate: Positive | None = None


class TinyReference(TinyModel):
    """A reference policy trained from scratch."""

    vocab_size: Count | None = None


class Testbed(Section):
    """Train a tiny reference policy and reward model first; `corpus: docstrings` needs no data at all."""

    corpus: Literal["docstrings"] | None = None
    demonstrations: Rows | None = None
    preferences: list[Rows] = []
    held_out: Share = 0.1
    reference: TinyReference = TinyReference()
    reward_model: TinyModel = TinyModel()

    @model_validator(mode="after")
    def _one_corpus(self) -> Testbed:
        if (self.corpus is None) == (self.demonstrations is None or not self.preferences):
            raise ValueError("give either corpus: docstrings, or both demonstrations and preferences")
        return self


class Policy(Section):
    """The reference policy, where alignment starts."""

    model: str | None = None
    trust_remote_code: bool = False
    allow_pickle: bool = False


class Reward(Section):
    """What scores a response: a sequence-classification model, a Python function `module:function`, or a server.

    A server gets `{"prompts": [...], "completions": [...]}` and answers `{"rewards": [...]}`; `name` stands for what it
    scores with, so give another one when that changes.
    """

    model: str | None = None
    function: str | None = None
    url: Address | None = None
    name: str | None = None
    api_key_variable: Variable | None = None  # the environment variable that holds the server's key
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

    name: Annotated[str, Field(pattern=NAME)] | None = None

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


class Prompts(Section):
    """Prompts to train on, and prompts kept apart for evaluation."""

    source: str | None = None
    split: str | None = None
    column: str = "prompt"
    train: Count = 512
    evaluation: Count = 128
    held_out: Share = 0.2
    max_characters: Count | None = None  # longer prompts are left out, and counted
    evaluation_source: str | None = None


class RolloutEndpoint(Section):
    """An OpenAI-compatible server of the reference policy (vLLM, SGLang …) that draws its rollouts."""

    url: Address  # ends before /completions, usually in /v1
    model: str  # its name there; give another when the server serves other weights
    api_key_variable: Variable | None = None  # the environment variable that holds the key
    concurrency: Count = 16


class Rollouts(Section):
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


class Calibration(Section):
    """How scores become quantiles."""

    ties: Literal["midrank", "strict", "inclusive", "random"] = "midrank"


class InMixture(Section):
    """Training inside a mixture with the reference (M19)."""

    weight: Annotated[float, Field(gt=0, le=1)] | Literal["auto"] = (
        "auto"  # the trained model's share; auto: from theory
    )


def _mixture_value(value: Any) -> Any:
    """`auto` for `{weight: auto}`; anything else as it is."""
    return {"weight": "auto"} if value == "auto" else value


class Reshape(Section):
    """Reshaping an aligned model by a function of its own log-ratio, after training (M16)."""

    kind: Literal["auto", "mixture", "reshaped", "none"] = "auto"
    methods: Literal["own", "all"] = "own"  # the recipe's own transform, or those of compare_with as well
    num_samples: Annotated[int, Field(ge=2)] = 32  # rollouts of the aligned model per calibration prompt


def reshape_value(value: Any) -> Any:
    """`auto` for `{kind: auto}`; anything else as it is."""
    return {"kind": value} if isinstance(value, str) else value


class Training(Section):
    """How the policy is trained; `rloo` takes any further field of TRL's RLOOConfig, `offline` of TrainingArguments."""

    solver: Literal["online", "offline-regression", "weighted-likelihood", "mixed"] = "online"

    steps: Count = 200
    prompts_per_step: Count = 16
    num_generations: Count = 16
    learning_rate: Positive = 1e-5
    baseline: Literal["known", "leave-one-out"] = "known"
    anneal: Annotated[float, Field(ge=0, lt=1)] = 0.25  # share of the steps over which the tilt is brought in
    # The recipe's own transform is trained inside a mixture with the reference; auto: where theory has a use for one.
    mixture: Annotated[InMixture | Literal["none"], BeforeValidator(_mixture_value)] = "none"
    tilt_cap: Positive | None = None  # nats above log Z that a tilt may have; spreads a sharp one over more rollouts
    lora: Settings | None = None
    save_steps: Count = 25
    keep_checkpoints: bool = False  # for `infalign evaluate --run RUN --checkpoints`
    refresh_every: Annotated[int, Field(ge=2)] = 10  # steps between fresh rollouts; for solver: mixed
    rloo: Settings = {}
    offline: Settings = {}

    @property
    def online(self) -> dict[str, Any]:
        """What the online solver takes."""
        return self.model_dump(exclude={"solver", "refresh_every", "offline", "mixture"})


class Evaluation(Section):
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
