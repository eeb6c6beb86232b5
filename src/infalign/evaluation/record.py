"""`evaluation.json`: all that one evaluation found, and what it was made of, so that others can be set beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from infalign.errors import InputError, StorageError
from infalign.evaluation.results import MethodResult

FILE = "evaluation.json"
_OLD = "Run the evaluation again"


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
        settings: What was asked for.
        versions: Versions of packages.
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
    settings: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON form."""
        return {**vars(self), "results": [result.to_dict() for result in self.results]}

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
            return cls(**{**data, "results": [MethodResult.from_dict(entry) for entry in data["results"]]})
        except (KeyError, TypeError) as error:
            raise InputError(f"not an evaluation of this version ({error})", where=where, mend=_OLD) from error
        except InputError as error:
            raise InputError(error.what, where=where, mend=_OLD) from error

    @classmethod
    def read(cls, folder: str | Path) -> Evaluation:
        """The evaluation in a run folder.

        Args:
            folder: The folder of a run or of an evaluation.

        Raises:
            StorageError: If there is none.
            InputError: If it is damaged or of an earlier version.
        """
        path = Path(folder) / FILE
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise StorageError(
                "there is no finished evaluation here", where=str(folder), mend="Run `infalign evaluate` first"
            ) from error
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise StorageError(f"the evaluation cannot be read ({error})", where=str(path), mend=_OLD) from error
        return cls.from_dict(data, str(path))
