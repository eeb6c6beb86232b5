"""A known truth for fits: the Gaussian channel (M14). ℓ is linear in a score s, the reward is ρ s + √(1 − ρ²) e."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit, ndtr, ndtri

from infalign.procedures import InferenceProcedure
from infalign.reshape import Reshaping, ReshapingData

Float = NDArray[np.float64]

_S = np.linspace(-8.0, 8.0, 161)
_P = np.exp(-0.5 * _S**2) / np.exp(-0.5 * _S**2).sum()
_U = np.concatenate([[0.0], expit(np.linspace(-16.0, 16.0, 161)), [1.0]])


@cache
def _cdf_by_score(rho: float) -> Float:
    """P(U ≤ u | s), one row for each u."""
    return ndtr((ndtri(_U)[:, None] - rho * _S) / np.sqrt(1 - rho**2))


@dataclass
class Channel:
    """P prompts; the aligned model shifts s by `shift_P` (KL shift²/2), the reward has correlation `rho_P` with s."""

    shift_P: Float  # noqa: N815
    rho_P: Float  # noqa: N815

    @classmethod
    def random(cls, rng: np.random.Generator, prompts: int, shift: float) -> Channel:
        return cls(
            np.clip(rng.normal(shift, 0.2 * shift, prompts), 0.2, None), rng.choice([0.5, 0.6, 0.7, 0.8], prompts)
        )

    def draw(self, rng: np.random.Generator, num_ref: int, num_aligned: int) -> ReshapingData:
        shift, rho = self.shift_P[:, None], self.rho_P[:, None]
        s_PK = rng.standard_normal((len(shift), num_ref))
        s_PG = rng.standard_normal((len(shift), num_aligned)) + shift

        def rewards(s: Float) -> Float:
            return rho * s + np.sqrt(1 - rho**2) * rng.standard_normal(s.shape)

        aligned = {} if num_aligned == 0 else {
            "aligned_log_ratios_PG": shift * s_PG - shift**2 / 2, "aligned_rewards_PG": rewards(s_PG)
        }  # fmt: skip
        return ReshapingData.from_rewards(shift * s_PK - shift**2 / 2, rewards(s_PK), **aligned)

    def truth(self, reshaping: Reshaping, procedure: InferenceProcedure) -> tuple[Float, Float]:
        """Exact KL and win rate of each prompt, by quadrature over s and u."""
        opponent = procedure.distortion(_U)
        kl_P, win_rate_P = np.zeros(len(self.rho_P)), np.zeros(len(self.rho_P))
        for at, (shift, rho) in enumerate(zip(self.shift_P, self.rho_P, strict=True)):
            log_density = reshaping.log_density(shift * _S - shift**2 / 2)
            log_density = log_density - np.log(_P @ np.exp(log_density))
            mass = _P * np.exp(log_density)
            kl_P[at] = mass @ log_density
            cdf = _cdf_by_score(float(rho)) @ mass
            output = procedure.distortion(np.clip(cdf, 0, 1))
            win_rate_P[at] = 1 - np.sum(0.5 * (output[1:] + output[:-1]) * np.diff(opponent))
        return kl_P, win_rate_P
