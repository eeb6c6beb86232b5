"""The log-ratios that a reshaping was fitted on, as a picture shows them."""

from __future__ import annotations

from typing import Any

import numpy as np

from infalign.errors import InputError
from infalign.reshape.data import ReshapingData


def log_ratio_histogram(data: ReshapingData, *, bins: int = 40) -> dict[str, Any]:
    """Densities of the reference's and the aligned model's log-ratios, over one set of bins.

    Args:
        data: Rollouts of the reference, and of one aligned model where there are some.
        bins: How many.

    Returns:
        "edges" (bins + 1) in nats; "reference" and "aligned" (bins), densities of the pooled rollouts. What lies
        beyond the middle 99.6 % is kept in the end bins. "aligned" is None where there are no such rollouts.

    Raises:
        InputError: If there are several aligned models, and so no single log-ratio.
    """
    if data.num_models > 1:
        raise InputError(
            f"{data.num_models} aligned models have no single log-ratio",
            where="log_ratio_histogram",
            hint="Give the data of one of them",
        )
    groups = [group.log_ratio_PGM[..., 0][group.real_PG] for group in (data.ref, *data.aligned)]
    low, high = np.quantile(np.concatenate(groups), [0.002, 0.998])
    edges = np.linspace(low, high if high > low else low + 1.0, bins + 1)
    densities = [
        (np.histogram(np.clip(values, edges[0], edges[-1]), edges)[0] / (values.size * np.diff(edges))).tolist()
        if values.size
        else None
        for values in groups
    ]
    return {
        "edges": edges.tolist(),
        "reference": densities[0],
        "aligned": densities[1] if len(densities) > 1 else None,
    }
