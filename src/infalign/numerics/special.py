"""SciPy's special functions with types, which SciPy does not ship, and the Beta density."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, cast

import numpy as np
import numpy.typing as npt
from scipy import special as _scipy_special  # pyright: ignore[reportMissingTypeStubs]


class _Special(Protocol):
    betainc: Callable[[Any, Any, Any], Any]
    betaln: Callable[[Any, Any], Any]
    gammaln: Callable[[Any], Any]
    log_ndtr: Callable[[Any], Any]
    logsumexp: Callable[..., Any]
    ndtr: Callable[[Any], Any]
    ndtri: Callable[[Any], Any]
    psi: Callable[[Any], Any]
    xlogy: Callable[[Any, Any], Any]
    xlog1py: Callable[[Any, Any], Any]


_typed = cast(_Special, _scipy_special)
betainc, betaln, gammaln, logsumexp, psi = _typed.betainc, _typed.betaln, _typed.gammaln, _typed.logsumexp, _typed.psi
xlogy, xlog1py = _typed.xlogy, _typed.xlog1py
ndtr, ndtri, log_ndtr = _typed.ndtr, _typed.ndtri, _typed.log_ndtr


def beta_density(a: Any, b: Any, q: Any) -> npt.NDArray[np.float64]:
    """The Beta(a, b) density in logarithms, so that large a and b neither over- nor underflow on the way."""
    return np.exp(xlogy(a - 1.0, q) + xlog1py(b - 1.0, -q) - betaln(a, b))
