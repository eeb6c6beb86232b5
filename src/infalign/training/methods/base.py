"""What a method is, what a comparator is, and the registry of comparators.

A *method* says how a policy is trained. Two kinds: the transforms of this library, trained by whichever solver the
recipe names; and *comparators*, what others do, each with a solver of its own. To add a comparator, write one file in
this folder (docs/extending.md).
"""

from __future__ import annotations

import difflib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from infalign.errors import InputError

if TYPE_CHECKING:
    from infalign.calibration.calibrator import RewardCalibrator
    from infalign.calibration.combined import CombinedCalibrator
    from infalign.procedures import InferenceProcedure
    from infalign.rewards.source import RewardSource
    from infalign.training.losses import OfflineLoss
    from infalign.training.reward import TransformedReward
    from infalign.transforms import RewardTransform

# What decides the result of a training, of the recipe's section `training`.
_ALWAYS = {"steps", "prompts_per_step", "num_generations", "learning_rate", "lora", "keep_checkpoints"}
ONLINE_SETTINGS = frozenset(_ALWAYS | {"baseline", "anneal", "tilt_cap", "rloo"})
OFFLINE_SETTINGS = frozenset(_ALWAYS | {"offline"})


class Method(ABC):
    """How a policy is trained.

    Attributes:
        name: A short name that can be a folder.
        label: What it is, in a word or two.
        rollouts_per_example: How many rollouts its loss looks at together: 2 for pairs.
        num_ref: Fewest reference rollouts per prompt that it can do with.
        single_reward: Whether it needs one reward, because several have no common scale before calibration.
        aim: Φ of the optimum that it ends at, as far as that is known; None otherwise.
    """

    name: str
    label: str
    rollouts_per_example: int = 1
    num_ref: int = 2
    single_reward: bool = False
    aim: RewardTransform | None = None

    @property
    @abstractmethod
    def described(self) -> dict[str, Any]:
        """All there is to know of it, JSON-able: a training is repeated where this changes."""

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """Its part of an entry in `plan.json`; `method_from_dict` reads it."""

    @abstractmethod
    def solved_by(self, solver: str) -> str:
        """What trains it where the recipe says `solver`: that, or a comparator's own "online" or "offline"."""

    @abstractmethod
    def beta_for_kl(self, kl: float, calibrator: RewardCalibrator | CombinedCalibrator | None = None) -> float:
        """The β at which it has this KL in nats, as far as that is known before training.

        Args:
            kl: In nats.
            calibrator: The reference's rewards; a comparator that needs them to find its β takes them from here.

        Raises:
            InputError: If it cannot have that KL.
        """

    def deciding_settings(self, solver: str) -> frozenset[str]:
        """Names of the recipe's training settings that decide its result."""
        return ONLINE_SETTINGS if self.solved_by(solver) == "online" else OFFLINE_SETTINGS

    def require_references(self, num_ref: int) -> None:
        """Refuse a recipe with too few reference rollouts per prompt.

        Raises:
            InputError: If there are too few.
        """
        if num_ref < self.num_ref:
            raise InputError(
                f"{self.label} needs {self.num_ref} reference rollouts per prompt, but there are only {num_ref}",
                where="compare_with",
                hint="Use more rollouts.num_ref",
            )

    def reward(
        self,
        source: RewardSource,
        calibrator: RewardCalibrator | CombinedCalibrator,
        prompt_ids: Sequence[str],
        beta: float,
        *,
        procedure: InferenceProcedure | None = None,
        mixture_weight: float = 1.0,
    ) -> TransformedReward:
        """What online training maximises; arguments as for `TransformedReward`.

        Raises:
            InputError: If it is a loss on stored rollouts instead, or needs one reward where there are several.
        """
        raise InputError(
            f"{self.name} is a loss on stored rollouts, not a reward",
            where="compare_with",
            hint=f"Choose a transform, or one of the baselines {', '.join(comparator_kinds(online=True))}",
        )

    def loss(self, beta: float, solver: str) -> OfflineLoss:
        """What training on stored rollouts minimises.

        Args:
            beta: KL coefficient.
            solver: The recipe's.

        Raises:
            InputError: If it is a reward for online training instead.
        """
        raise InputError(f"{self.name} is a reward for online training, not a loss", where="training.solver")


@dataclass(frozen=True)
class Setting:
    """A setting of a comparator, a number.

    Attributes:
        default: Its value where the recipe does not give it.
        wanted: What a usable value is, in words.
        usable: Whether a value is usable.
        whole: Whether it is a whole number.
    """

    default: float | None
    wanted: str
    usable: Callable[[float], bool]
    whole: bool = False


def positive(default: float | None) -> Setting:
    """A positive number."""
    return Setting(default, "a positive number", lambda value: value > 0)


def share(default: float | None) -> Setting:
    """A number between 0 and 1."""
    return Setting(default, "a number between 0 and 1", lambda value: 0 <= value <= 1)


def group_size(default: int) -> Setting:
    """How many rollouts are looked at together."""
    return Setting(
        default, "a whole number of at least 2", lambda value: value >= 2 and float(value).is_integer(), whole=True
    )


class Comparator(Method):
    """A method that others use, to compare with: `{baseline: KIND, SETTING: VALUE}` in a recipe.

    Args:
        **given: Its settings, as the recipe gives them; the others have their defaults.

    Attributes:
        kind: What a recipe calls it.
        online: Whether it is a reward for the online solver; otherwise it is a loss on stored rollouts.
        SETTINGS: What can be set, by name.
        settings: The value of every setting.

    Raises:
        InputError: If there is no such setting, or a value is unusable.
    """

    kind: ClassVar[str]
    online: ClassVar[bool]
    SETTINGS: ClassVar[Mapping[str, Setting]] = {}

    def __init__(self, **given: Any) -> None:
        self.given = given
        self.settings: dict[str, Any] = {name: setting.default for name, setting in self.SETTINGS.items()}
        for name, value in given.items():
            self.settings[name] = self._checked(name, value)
        self.label = self.kind
        self.name = "-".join([self.kind, *(f"{name}{value:g}" for name, value in given.items())])  # dpo-n8-beta0.2

    def _checked(self, name: str, value: Any) -> Any:
        setting = self.SETTINGS.get(name)
        if setting is None:
            takes = f"it takes: {', '.join(self.SETTINGS)}" if self.SETTINGS else "it takes none"
            raise InputError(f"the baseline {self.kind} has no setting {name!r}", where="compare_with", hint=takes)
        number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not number or not setting.usable(value):
            raise InputError(
                f"{name} of the baseline {self.kind} must be {setting.wanted}, not {value!r}", where="compare_with"
            )
        return int(value) if setting.whole else value

    @property
    def described(self) -> dict[str, Any]:
        """As a recipe says it."""
        return {"baseline": self.kind, **self.given}

    def to_dict(self) -> dict[str, Any]:
        """Its part of an entry in `plan.json`."""
        return {"baseline": self.described}

    def solved_by(self, solver: str) -> str:
        """Its own solver, whatever the recipe's transforms use."""
        return "online" if self.online else "offline"


_KINDS: dict[str, type[Comparator]] = {}
Kind = TypeVar("Kind", bound=type[Comparator])


def comparator(cls: Kind) -> Kind:
    """Class decorator: make a comparator known to recipes under its `kind`."""
    _KINDS[cls.kind] = cls
    return cls


def comparator_kinds(*, online: bool | None = None) -> list[str]:
    """Names of all comparators, or of those with a reward (`online`) or a loss alone; the simplest first."""
    found = [kind for kind, cls in _KINDS.items() if online in (None, cls.online)]
    return sorted(found, key=lambda kind: (not _KINDS[kind].online, len(_KINDS[kind].SETTINGS), kind))


def comparator_from_dict(described: Mapping[str, Any]) -> Comparator:
    """The comparator that a recipe describes, `{baseline: dpo, n: 8}`.

    Raises:
        InputError: If the name or a setting is unknown or unusable.
    """
    kind, given = described["baseline"], {name: value for name, value in described.items() if name != "baseline"}
    if kind not in _KINDS:
        close = difflib.get_close_matches(str(kind), _KINDS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"there are: {', '.join(comparator_kinds())}"
        raise InputError(f"unknown baseline {kind!r}", where="compare_with", hint=hint)
    return _KINDS[kind](**given)
