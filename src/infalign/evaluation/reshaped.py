"""How a reshaped policy was made, what was predicted of it before anything was drawn, and what drawing from it took."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infalign._io.inventory import read_object
from infalign.reshape import Reshaping
from infalign.reshape.reshaping import Predicted, Predictions

FIT_FILE = "reshape.json"
"""The fit, in the folder of the policy that it gave."""


@dataclass(frozen=True)
class ReshapedRecord:
    """A mixture or a reshaped policy, beside whose measured results this stands.

    Attributes:
        kind: "mixture", or "reshaped" (by an increasing function of the log-ratio, drawn by rejection).
        method: The method that the aligned model was trained with.
        weight: Share of the aligned model: of the mixture, or of the proposal for rejection.
        procedure: Label of the procedure that it was fitted for.
        predictions: KL, win rates and cost as predicted at the fit.
        alone_kl: Predicted KL of the aligned model alone, in nats.
        trained_weight: The aligned model's share during its own training inside a mixture (M19); None where it was
            trained to be used alone.
        acceptance: Share of the proposals that were accepted when responses were drawn for the evaluation; 1 for a
            mixture, which rejects nothing.
        tokens: Tokens generated for each response of the evaluation, rejected ones included; None if not counted.
    """

    kind: str
    method: str
    weight: float
    procedure: str
    predictions: Predictions
    alone_kl: Predicted | None = None
    trained_weight: float | None = None
    acceptance: float | None = None
    tokens: float | None = None

    @classmethod
    def of_fit(
        cls, content: Mapping[str, Any], *, acceptance: float | None = None, tokens: float | None = None
    ) -> ReshapedRecord:
        """From what `read_fit` gave, and what was counted since.

        Raises:
            InputError: If it holds no reshaping.
        """
        fit = Reshaping.from_dict(content["reshaping"])
        assert fit.procedure is not None, "a stored fit is for a procedure"
        assert fit.predictions is not None, "a stored fit predicts"
        plain = content.get("plain")
        return cls(
            kind=fit.kind,
            method=content["method"],
            weight=fit.mixture_weight,
            procedure=fit.procedure,
            predictions=fit.predictions,
            alone_kl=None if plain is None else Predicted.from_dict(plain["kl"]),
            trained_weight=content.get("trained_weight"),
            acceptance=1.0 if fit.kind == "mixture" else acceptance,
            tokens=tokens,
        )

    @property
    def is_mixture(self) -> bool:
        """Whether each response is simply drawn from one of its models."""
        return self.kind == "mixture"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON form."""
        return {
            **vars(self),
            "predictions": self.predictions.to_dict(),
            "alone_kl": None if self.alone_kl is None else self.alone_kl.to_dict(),
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> ReshapedRecord:
        """Inverse of `to_dict`."""
        alone = content.get("alone_kl")
        return cls(
            **{
                **content,
                "predictions": Predictions.from_dict(content["predictions"]),
                "alone_kl": None if alone is None else Predicted.from_dict(alone),
            }
        )


def read_fit(folder: str | Path) -> dict[str, Any] | None:
    """The fit in the folder of the policy that it gave; None where there is none.

    Args:
        folder: `policies/NAME/reshaped` of a run.
    """
    path = Path(folder) / FIT_FILE
    if not path.is_file():
        return None
    # Fits of earlier versions do not say of which method they are.
    return {"method": path.resolve().parent.parent.name, **read_object(path, "Reshape again, or run the recipe again")}
