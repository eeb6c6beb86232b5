"""The fitted object: a density relative to the reference that depends on a response through its log-ratio alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import optimize as _optimize  # pyright: ignore[reportMissingTypeStubs]

from infalign._io.files import write_json
from infalign.errors import InputError
from infalign.estimators.clustered import Estimate
from infalign.numerics.special import logsumexp

Float = NDArray[np.float64]
Kind = Literal["mixture", "reshaped"]
optimize = cast(Any, _optimize)


@dataclass(frozen=True)
class Predicted:
    """A number predicted before anything is drawn.

    Attributes:
        estimate: Mean over prompts.
        standard_error: Clustered by prompt; NaN for one prompt.
        confidence_interval: Lower and upper end, 95 %.
    """

    estimate: float
    standard_error: float
    confidence_interval: tuple[float, float]

    @classmethod
    def of(cls, estimate: Estimate) -> Predicted:
        """The summary of a mean over prompts."""
        return cls(estimate.estimate, estimate.standard_error, estimate.confidence_interval)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; an infinite or missing number becomes None."""
        numbers = [self.estimate, self.standard_error, *self.confidence_interval]
        estimate, error, low, high = (value if np.isfinite(value) else None for value in numbers)
        return {"estimate": estimate, "standard_error": error, "confidence_interval": [low, high]}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Predicted:
        """Inverse of `to_dict`."""
        low, high = content["confidence_interval"]
        return cls(
            _number(content["estimate"], np.nan),
            _number(content["standard_error"], np.nan),
            (_number(low, -np.inf), _number(high, np.inf)),
        )


@dataclass(frozen=True)
class Predictions:
    """What a reshaped policy is predicted to do on new prompts.

    Attributes:
        kl: KL to the reference in nats, of whole responses.
        win_rates: Win rate of each procedure, by its label.
        acceptance: Share of proposals that rejection accepts; 1 for a mixture.
        tries: Proposals for each delivered response, 1/acceptance on each prompt.
        tokens: Tokens generated for each delivered response, rejected ones included; None if no lengths were given.
        effective_samples: How many equally weighted rollouts of a prompt would tell as much, averaged over prompts.
            Below about 4 N, win rates of Best-of-N or Worst-of-N are rough.
        cross_fitted: Whether each prompt was predicted by a fit to other prompts.
    """

    kl: Predicted
    win_rates: dict[str, Predicted]
    acceptance: Predicted
    tries: Predicted
    tokens: Predicted | None
    effective_samples: float
    cross_fitted: bool

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "kl": self.kl.to_dict(),
            "win_rates": {label: rate.to_dict() for label, rate in self.win_rates.items()},
            "acceptance": self.acceptance.to_dict(),
            "tries": self.tries.to_dict(),
            "tokens": None if self.tokens is None else self.tokens.to_dict(),
            "effective_samples": self.effective_samples,
            "cross_fitted": self.cross_fitted,
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Predictions:
        """Inverse of `to_dict`."""
        return cls(
            Predicted.from_dict(content["kl"]),
            {label: Predicted.from_dict(rate) for label, rate in content["win_rates"].items()},
            Predicted.from_dict(content["acceptance"]),
            Predicted.from_dict(content["tries"]),
            None if content["tokens"] is None else Predicted.from_dict(content["tokens"]),
            float(content["effective_samples"]),
            bool(content["cross_fitted"]),
        )


@dataclass(frozen=True, eq=False)
class Reshaping:
    """π_g(y|x) = p(y|x) g(ℓ(x, y)) / Z_x with ℓ = log q(y|x) − log p(y|x) (reshaped policy, M16).

    Make one with `mixture`, `table` or `fit_reshaping`. Between its knots log g is linear, outside them constant.

    Attributes:
        kind: "mixture": g = 1 − Σ ε_m + Σ ε_m e^{ℓ_m}, Z = 1 exactly; "reshaped": any increasing g of one log-ratio.
        weights: Weights ε_m of the aligned models: the policy's for a mixture, the proposal's for rejection otherwise.
        knots: Log-ratios at which log g is given, ascending; empty for a mixture.
        log_values: log g there, unnormalised.
        log_bound: Largest value over all ℓ of log g − log(1 − ε + ε e^ℓ); 0 for a mixture. A proposal from the mixture
            is accepted with probability exp(log g(ℓ) − log(1 − ε + ε e^ℓ) − log_bound).
        procedure: Label of the procedure it was fitted for; None if it was not fitted.
        beta: Price of KL at the fit, in win rate per nat; None if it was not fitted.
        predictions: What it is predicted to do; None if it was not fitted.
    """

    kind: Kind
    weights: tuple[float, ...]
    knots: Float = field(default_factory=lambda: np.zeros(0))
    log_values: Float = field(default_factory=lambda: np.zeros(0))
    log_bound: float = 0.0
    procedure: str | None = None
    beta: float | None = None
    predictions: Predictions | None = None

    @classmethod
    def mixture(cls, *weights: float) -> Reshaping:
        """A mixture that draws from each aligned model with the given chance, else from the reference.

        Raises:
            InputError: If a weight is negative or NaN, or they sum to more than 1.
        """
        if not weights or not all(weight >= 0 for weight in weights) or sum(weights) > 1 + 1e-12:
            raise InputError(
                f"weights {weights} do not make a mixture", where="Reshaping.mixture", hint="Use 0 ≤ Σ weights ≤ 1"
            )
        return cls("mixture", tuple(float(weight) for weight in weights))

    @classmethod
    def table(cls, knots: ArrayLike, log_values: ArrayLike) -> Reshaping:
        """An increasing g given by log g at some log-ratios, with the proposal that wastes least.

        Raises:
            InputError: If the knots do not ascend, log g decreases, or a number is not finite.
        """
        x, y = np.asarray(knots, dtype=np.float64), np.asarray(log_values, dtype=np.float64)
        where = "Reshaping.table"
        if x.ndim != 1 or x.shape != y.shape or not len(x) or not (np.isfinite(x).all() and np.isfinite(y).all()):
            raise InputError("knots and values are not two lists of finite numbers of one length", where=where)
        if (np.diff(x) <= 0).any() or (np.diff(y) < 0).any():
            raise InputError("the knots do not ascend, or log g decreases", where=where, hint="Sort the knots")
        weight = best_proposal(x, y)
        return cls("reshaped", (weight,), x, y, log_bound(x, y, weight))

    def log_density(self, log_ratios: ArrayLike) -> Float:
        """Log g: exact log(π/p) for a mixture, up to the prompt's log Z otherwise.

        Args:
            log_ratios: Log-ratios in nats, any shape; with a last axis of length M for M > 1 aligned models.

        Raises:
            InputError: If a log-ratio is NaN or the last axis does not fit.
        """
        ratios = np.asarray(log_ratios, dtype=np.float64)
        if np.isnan(ratios).any():
            raise InputError("a log-ratio is NaN", where="log_density")
        if self.kind == "reshaped":
            return np.interp(ratios, self.knots, self.log_values)
        return log_mixture(self.weights, ratios)

    def log_acceptance(self, log_ratios: ArrayLike) -> Float:
        """Log of the chance that rejection accepts a proposal with this log-ratio; at most 0."""
        ratios = np.asarray(log_ratios, dtype=np.float64)
        if self.kind == "mixture":
            return np.zeros(ratios.shape[:-1] if len(self.weights) > 1 else ratios.shape)
        return np.minimum(self.log_density(ratios) - log_mixture(self.weights, ratios) - self.log_bound, 0.0)

    @property
    def mixture_weight(self) -> float:
        """Total weight of the aligned models: ε of the policy for a mixture, of the proposal otherwise."""
        return float(sum(self.weights))

    @property
    def kl(self) -> float | None:
        """Predicted KL to the reference in nats; `predictions` has its error."""
        return None if self.predictions is None else self.predictions.kl.estimate

    @property
    def win_rate(self) -> float | None:
        """Predicted win rate of the procedure it was fitted for; `predictions` has its error and other procedures."""
        if self.predictions is None or self.procedure is None:
            return None
        return self.predictions.win_rates[self.procedure].estimate

    @property
    def acceptance(self) -> float | None:
        """Predicted share of accepted proposals; 1 for a mixture, None where unknown."""
        if self.predictions is None:
            return 1.0 if self.kind == "mixture" else None
        return self.predictions.acceptance.estimate

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready description."""
        return {
            "kind": self.kind,
            "weights": list(self.weights),
            "knots": self.knots.tolist(),
            "log_values": self.log_values.tolist(),
            "procedure": self.procedure,
            "beta": self.beta,
            "predictions": None if self.predictions is None else self.predictions.to_dict(),
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Reshaping:
        """Inverse of `to_dict`. The bound is computed again, so that an edited file cannot make rejection inexact.

        Raises:
            InputError: If a field is missing or does not fit.
        """
        try:
            kind, weights = content["kind"], tuple(float(weight) for weight in content["weights"])
            if kind == "mixture":
                shape = cls.mixture(*weights)
            elif kind == "reshaped" and len(weights) == 1 and 0 <= weights[0] < 1:
                made = cls.table(content["knots"], content["log_values"])
                bound = log_bound(made.knots, made.log_values, weights[0])
                shape = cls("reshaped", weights, made.knots, made.log_values, bound)
            else:
                raise InputError(f"kind {kind!r} with weights {weights}", where="reshaping")
            predictions = content.get("predictions")
            beta = content.get("beta")
            return cls(
                shape.kind,
                shape.weights,
                shape.knots,
                shape.log_values,
                shape.log_bound,
                content.get("procedure"),
                None if beta is None else float(beta),
                None if predictions is None else Predictions.from_dict(predictions),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"not a reshaping: {error}", where="reshaping", hint="Give what Reshaping.to_dict wrote"
            ) from error

    def save(self, path: str | Path) -> None:
        """Write it as JSON.

        Raises:
            StorageError: If it cannot be written.
        """
        write_json(Path(path), self.to_dict())

    @classmethod
    def load(cls, path: str | Path) -> Reshaping:
        """Read what `save` wrote.

        Raises:
            InputError: If the file is missing or holds something else.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise InputError(f"cannot be read: {error}", where=str(path)) from error
        return cls.from_dict(content)


def log_mixture(weights: tuple[float, ...], log_ratios: Float) -> Float:
    """log(1 − Σ ε_m + Σ ε_m e^{ℓ_m}), without overflow."""
    if len(weights) == 1:
        log_ratios = log_ratios[..., None]
    elif log_ratios.ndim == 0 or log_ratios.shape[-1] != len(weights):
        raise InputError(
            f"{len(weights)} aligned models, but log-ratios of shape {log_ratios.shape}",
            where="log_density",
            hint="Give one log-ratio for each model along the last axis",
        )
    with np.errstate(divide="ignore"):
        log_base = np.log(max(1.0 - sum(weights), 0.0))
        parts = log_ratios + np.log(np.asarray(weights))
    return np.asarray(logsumexp(np.concatenate([np.full((*parts.shape[:-1], 1), log_base), parts], axis=-1), axis=-1))


def log_bound(knots: Float, log_values: Float, weight: float) -> float:
    """The largest log g(ℓ) − log(1 − ε + ε e^ℓ) over all real ℓ, exactly.

    On each piece log g is linear and the other term convex, so the largest value is at a knot, at −∞, or where the
    slopes agree: s = ε e^ℓ / (1 − ε + ε e^ℓ).
    """
    if weight >= 1:
        return np.inf
    candidates = [log_values[0] - np.log1p(-weight), *(log_values - log_mixture((weight,), knots))]
    if weight > 0 and len(knots) > 1:
        slopes = np.diff(log_values) / np.diff(knots)
        inside = (slopes > 0) & (slopes < 1)
        slopes = np.where(inside, slopes, 0.5)
        at = np.log(slopes) - np.log1p(-slopes) + np.log1p(-weight) - np.log(weight)
        inside &= (at > knots[:-1]) & (at < knots[1:])
        candidates += list((np.interp(at, knots, log_values) - log_mixture((weight,), at))[inside])
    return float(max(candidates))


def best_proposal(knots: Float, log_values: Float) -> float:
    """The weight ε of the mixture from which rejection accepts most often.

    The bound is convex in ε, and the acceptance Z e^{−bound} of every prompt is highest where it is lowest.
    """
    found = optimize.minimize_scalar(
        lambda weight: log_bound(knots, log_values, float(weight)),
        bounds=(0.0, 1.0 - 1e-6),
        method="bounded",
        options={"xatol": 1e-6},
    )
    weight = float(found.x)
    return 0.0 if log_bound(knots, log_values, 0.0) <= log_bound(knots, log_values, weight) else weight


def _number(value: Any, missing: float) -> float:
    return missing if value is None else float(value)
