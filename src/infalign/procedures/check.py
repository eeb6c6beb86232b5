"""Whether a procedure is a distortion."""

from __future__ import annotations

import numpy as np

from infalign.errors import InputError
from infalign.procedures.base import InferenceProcedure


def check_procedure(procedure: InferenceProcedure) -> None:
    """Check that a procedure is a distortion: H(0) = 0, H(1) = 1, H increasing, h its derivative, any shape of array.

    Meant for procedures of your own; the solver calls it for you.

    Raises:
        InputError: If one of these does not hold, with the place where it fails.
    """
    where = f"procedure {procedure.label!r}"
    grid = np.linspace(0.0, 1.0, 1025)
    try:
        distortion = np.asarray(procedure.distortion(grid), dtype=np.float64)
        density = np.asarray(procedure.density(grid), dtype=np.float64)
    except (TypeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"distortion or density failed on an array: {error}", where=where) from error
    if distortion.shape != grid.shape or density.shape != grid.shape:
        raise InputError("distortion and density must return one value per point", where=where, hint="Vectorise them")
    if not (np.isfinite(distortion).all() and np.isfinite(density).all()):
        raise InputError("distortion or density is not finite everywhere on [0, 1]", where=where)
    for point, value in ((0.0, distortion[0]), (1.0, distortion[-1])):
        if abs(value - point) > 1e-9:
            raise InputError(f"H({point:g}) is {value:.6g}", where=where, hint=f"It must be {point:g}")
    steps = np.diff(distortion)
    if (steps < -1e-12).any() or (density < 0).any():
        worst = grid[int(np.argmin(steps))] if (steps < -1e-12).any() else grid[int(np.argmin(density))]
        raise InputError(f"the distortion decreases near q = {worst:.4g}", where=where, hint="H must be increasing")
    # h against H on every cell: a wrong derivative would silently give a wrong optimum. The cell average of h lies
    # between its least and greatest value there; sampling inside the cell leaves room for a curved h.
    points = grid[:-1, None] + np.linspace(0.0, 1.0, 9) / 1024
    inner = np.asarray(procedure.density(points), dtype=np.float64)
    if inner.shape != points.shape:
        raise InputError("density does not keep the shape of a matrix", where=where, hint="Use NumPy functions only")
    room = 1e-6 + 0.02 * np.abs(inner).max(axis=1) + (inner.max(axis=1) - inner.min(axis=1))
    gap = np.abs(steps * 1024 - inner.mean(axis=1))
    if (gap > room).any():
        cell = int(np.argmax(gap - room))
        raise InputError(
            f"density is not the derivative of distortion near q = {grid[cell]:.4g} "
            f"(h is about {inner[cell].mean():.4g}, H grows at {steps[cell] * 1024:.4g})",
            where=where,
            hint="Correct one of the two",
        )
