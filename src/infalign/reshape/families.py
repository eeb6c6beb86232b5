"""The densities that a fit chooses from: increasing functions of the log-ratio, and mixtures of models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from infalign.numerics.special import logsumexp
from infalign.reshape.pool import Pool

Float = NDArray[np.float64]

_KNOTS = 64
"""How many points carry log g; where there are no more distinct log-ratios than `_MOST_KNOTS`, each of them does."""
_MOST_KNOTS = 256


class Family(Protocol):
    """A set of densities with parameters, on one pool.

    Attributes:
        lower: Least value of each parameter (−inf if none).
        starts: Parameters to start from.
    """

    lower: Float
    starts: list[Float]

    def log_density(self, theta: Float) -> Float:
        """Log g at each sample, shape (P, S)."""
        ...

    def pull_back(self, theta: Float, gradient_PS: Float) -> Float:
        """The gradient with respect to the parameters from that with respect to log g at each sample."""
        ...


def knots_for(pool: Pool, extra: Sequence[Pool] = ()) -> Float:
    """Where log g is given: at each distinct log-ratio if they are few, else at quantiles, finer in the tails."""
    values = [part.log_ratio[np.isfinite(part.log_weight_PS)] for part in (pool, *extra)]
    distinct = np.unique(np.concatenate(values))
    if len(distinct) <= _MOST_KNOTS:
        return distinct
    # Evenly spaced quantiles in the logit, from about the tenth lowest to the tenth highest sample.
    end = np.log(max(len(distinct) / 10.0, 4.0))
    logits = np.linspace(-end, end, _KNOTS)
    return np.unique(np.quantile(np.concatenate(values), 1.0 / (1.0 + np.exp(-logits))))


class Increasing:
    """log g increasing, linear between knots and constant outside them; parameters are its steps, at least 0.

    Args:
        pool: The samples, with one aligned model.
        knots: (B,) log-ratios in ascending order.
    """

    def __init__(self, pool: Pool, knots: Float) -> None:
        self.knots = knots
        ratio_PS = np.where(np.isfinite(pool.log_weight_PS), pool.log_ratio, knots[0])
        if len(knots) == 1:
            self._left, self._share = np.zeros(ratio_PS.shape, dtype=np.intp), np.zeros(ratio_PS.shape)
        else:
            clipped = np.clip(ratio_PS, knots[0], knots[-1])
            self._left = np.clip(np.searchsorted(knots, clipped, side="right") - 1, 0, len(knots) - 2)
            width = knots[self._left + 1] - knots[self._left]
            self._share = (clipped - knots[self._left]) / width
        self.lower = np.zeros(len(knots) - 1)
        paths = [knots, np.minimum(knots, 0.0), 0.3 * knots]
        paths += [np.logaddexp(np.log1p(-weight), np.log(weight) + knots) for weight in (0.03, 0.3)]
        self.starts = [np.zeros(len(knots) - 1), *(np.diff(path) for path in paths)]

    def log_values(self, theta: Float) -> Float:
        """Log g at the knots, 0 at the lowest."""
        return np.concatenate([[0.0], np.cumsum(theta)])

    def log_density(self, theta: Float) -> Float:
        """See `Family`."""
        values = np.append(self.log_values(theta), 0.0)
        return values[self._left] * (1 - self._share) + values[self._left + 1] * self._share

    def pull_back(self, theta: Float, gradient_PS: Float) -> Float:
        """See `Family`."""
        size = len(self.knots) + 1
        by_knot = np.bincount(self._left.ravel(), ((1 - self._share) * gradient_PS).ravel(), minlength=size)
        by_knot += np.bincount(self._left.ravel() + 1, (self._share * gradient_PS).ravel(), minlength=size)
        return np.asarray(np.cumsum(by_knot[::-1])[::-1][1:-1], dtype=np.float64)


class Components:
    """Mixtures of the reference and M aligned models; parameters are log odds of each weight to the reference's.

    Args:
        pool: The samples.
    """

    def __init__(self, pool: Pool) -> None:
        num_models = pool.log_ratio_PSM.shape[2]
        real = np.isfinite(pool.log_weight_PS)[:, :, None]
        # Beyond e^600 a density is not told from infinity; log-ratios of responses are nowhere near.
        self._models_PSM = np.where(real, np.exp(np.minimum(pool.log_ratio_PSM, 600.0)), 1.0)
        self.lower = np.full(num_models, -np.inf)
        self.starts = [np.full(num_models, odds - np.log(num_models)) for odds in (-6.0, -3.0, -1.5, 0.0, 2.0, 6.0)]
        if num_models > 1:
            self.starts += [np.where(np.arange(num_models) == at, -1.0, -6.0) for at in range(num_models)]

    @staticmethod
    def log_weights(theta: Float) -> Float:
        """Log weights of reference and models, shape (M + 1,)."""
        odds = np.concatenate([[0.0], theta])
        return odds - np.asarray(logsumexp(odds))

    def log_density(self, theta: Float) -> Float:
        """See `Family`."""
        return np.log(self._density(theta))

    def pull_back(self, theta: Float, gradient_PS: Float) -> Float:
        """See `Family`."""
        weights = np.exp(self.log_weights(theta))
        relative_PS = gradient_PS / self._density(theta)
        by_model = np.einsum("ps,psm->m", relative_PS, self._models_PSM) * weights[1:]
        return by_model - gradient_PS.sum() * weights[1:]

    def _density(self, theta: Float) -> Float:
        weights = np.exp(self.log_weights(theta))
        return weights[0] + self._models_PSM @ weights[1:]
