"""`evaluation.json`: all that one evaluation found, and what it was made of, so that others can be set beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from infalign._io.inventory import require_whole
from infalign.errors import InputError, StorageError
from infalign.evaluation.results import MethodResult, Predictability

FILE = "evaluation.json"
_OLD = "Evaluate again with the same command: what was drawn and scored is kept"


@dataclass(frozen=True)
class Evaluation:
    """One finished evaluation.

    Attributes:
        name: What the run is called.
        procedure: `InferenceProcedure.to_dict` of the procedure that the model is used through.
        kl_budget: The KL that methods were steered to, in nats; None without one.
        reference: Fingerprint of the reference.
        reward: Key of the reward that procedures choose by.
        gold: Further rewards that judged: name → key in the stores.
        max_new_tokens: Cap on a response.
        stores: Where the rollouts are, by method's label and "reference"; relative to the folder of this file.
        results: Methods.
        comparisons: What `infalign.evaluation.compare.Comparison.to_dict` gave.
        baseline: Label of the method that the others are compared with on a page; None for none.
        warnings: What a reader must know before the numbers, in sentences.
        held_out: Whether no prompt is known to have been trained on by a model.
        settings: What was asked for.
        versions: Versions of packages.
        predictability: How well one of the policies tells the reward from its own text; None in files of earlier
            versions, and where no policy was measured by single samples.
    """

    name: str
    procedure: dict[str, Any]
    kl_budget: float | None
    reference: str
    reward: str
    gold: dict[str, str]
    max_new_tokens: int
    stores: dict[str, str]
    results: list[MethodResult]
    comparisons: list[dict[str, Any]]
    baseline: str | None = None
    warnings: list[str] = field(default_factory=list)
    held_out: bool = True
    settings: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    predictability: Predictability | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON form."""
        found = self.predictability
        return {
            **vars(self),
            "results": [result.to_dict() for result in self.results],
            "predictability": None if found is None else asdict(found),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], where: str = FILE) -> Evaluation:
        """Inverse of `to_dict`.

        Args:
            data: What `to_dict` returned.
            where: The file, for the message.

        Raises:
            InputError: If a field is missing or unknown, as in files of earlier versions.
        """
        try:
            found = data.get("predictability")
            return cls(
                **{
                    **data,
                    "results": [MethodResult.from_dict(entry) for entry in data["results"]],
                    "predictability": None if found is None else Predictability(**found),
                }
            )
        except (KeyError, TypeError, AttributeError, InputError) as error:
            raise InputError(_written_otherwise(data), where=where, hint=_OLD) from error

    @classmethod
    def read(cls, folder: str | Path) -> Evaluation:
        """The evaluation in a run folder.

        Args:
            folder: The folder of a run or of an evaluation.

        Raises:
            StorageError: If there is none, or it is damaged.
            InputError: If it is of an earlier version.
        """
        path = Path(folder) / FILE
        require_whole(folder, ["evaluation"])
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise StorageError(
                "there is no finished evaluation here", where=str(folder), hint="Run `infalign evaluate` first"
            ) from error
        except (OSError, ValueError, RecursionError) as error:
            raise StorageError(f"the evaluation cannot be read ({error})", where=str(path), hint=_OLD) from error
        return cls.from_dict(data, str(path))


def _written_otherwise(data: Any) -> str:
    """Why fields are missing or unknown: who wrote them, as far as that is known."""
    here = metadata.version("infalign")
    versions = data.get("versions") if isinstance(data, Mapping) else None
    wrote = versions.get("infalign") if isinstance(versions, Mapping) else None
    if wrote is None or wrote == here:
        return f"these results were not written by this infalign ({here}), but by an earlier or later one"
    return f"these results were written by infalign {wrote}; this is {here}, which keeps them in another form"
