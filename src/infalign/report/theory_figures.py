"""Pictures of the theory: transforms and frontiers. Computes nothing that the theory does not offer; only draws.

PNG and SVG come from matplotlib, HTML from plotly; either is loaded only when it is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from infalign._io.files import write_file, write_text
from infalign.errors import InputError
from infalign.numerics.quadrature import expit
from infalign.procedures import BestOfN, InferenceProcedure, WorstOfN
from infalign.theory.optimal import optimal_transform
from infalign.theory.plan import Option, Plan, frontier
from infalign.theory.tilt import TiltedPolicy
from infalign.transforms import Exponential, Identity, Log, RewardTransform

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Line:
    """One curve, or one point if x has one entry."""

    label: str
    x: Array
    y: Array
    emphasis: bool = False


@dataclass(frozen=True)
class Panel:
    """One set of axes."""

    title: str
    x_label: str
    y_label: str
    lines: tuple[Line, ...]


def transform_panel(transforms: Sequence[tuple[str, RewardTransform]], title: str, best: int | None = 0) -> Panel:
    """Transforms scaled to [0, 1]; the logarithm, which has no lower end, is scaled from u = 0.01.

    Args:
        transforms: Pairs (label, transform).
        title: Of the panel.
        best: Which one to emphasise, if any.
    """
    u = np.unique(np.concatenate([np.linspace(0.0, 1.0, 301), expit(np.linspace(-9.0, 9.0, 301))]))
    lines: list[Line] = []
    for index, (label, transform) in enumerate(transforms):
        values = transform(u)
        low = float(transform(0.01)) if isinstance(transform, Log) else float(values[0])
        scaled = (values - low) / (values[-1] - low)
        lines.append(Line(label, u, np.where(scaled < -0.05, np.nan, scaled), index == best))
    return Panel(title, "calibrated reward u", "transformed reward, scaled to [0, 1]", tuple(lines))


def frontier_panel(
    procedure: InferenceProcedure,
    transforms: Sequence[tuple[str, RewardTransform]],
    max_kl: float,
    opponent: InferenceProcedure | None = None,
    points: Sequence[Line] = (),
) -> Panel:
    """Win rate against KL: the limit, and what fixed transforms reach as β varies.

    Args:
        procedure: What is done with the policy.
        transforms: Pairs (label, transform).
        max_kl: Right end of the axis, in nats.
        opponent: What is done with the reference; the same procedure if None.
        points: More to show.
    """
    limit = frontier(procedure, max_kl, opponent=opponent)
    kls = np.linspace(0.0, np.sqrt(limit.kl[-1]), 200) ** 2
    lines = [Line("optimal (the limit)", kls, limit.at(kls), True)]
    for label, transform in transforms:
        x, y = _curve(transform, procedure, float(limit.kl[-1]), opponent)
        lines.append(Line(label, x, y))
    title = f"{procedure.label} against {(opponent or procedure).label}"
    return Panel(title, "KL from the reference, nats", "win rate", (*lines, *points))


def _curve(
    transform: RewardTransform, procedure: InferenceProcedure, max_kl: float, opponent: InferenceProcedure | None
) -> tuple[Array, Array]:
    """KL and win rate of a fixed transform as β varies, about evenly spaced in sqrt(KL), up to a KL."""
    betas = np.geomspace(100.0, 1e-6, 60)
    roots = np.sqrt(np.array([TiltedPolicy(transform, beta).kl for beta in betas]))
    wanted = np.linspace(roots[0], min(np.sqrt(max_kl), roots[-1]), 40)
    tilts = [TiltedPolicy(transform, beta) for beta in np.exp(np.interp(wanted, roots, np.log(betas)))]
    return np.array([tilt.kl for tilt in tilts]), np.array([tilt.win_rate(procedure, opponent) for tilt in tilts])


def plan_panels(plan: Plan) -> tuple[Panel, Panel]:
    """A plan as two panels: the transforms at its KL, and the frontier with every alternative."""
    options = (plan.best, *plan.alternatives)
    named = [(option.label, option.transform) for option in plan.alternatives if not option.label.startswith("top-1")]
    if plan.predictability < 1.0:
        return _channel_panels(plan, options)
    # The alternatives lie on their curves; marked are this plan and the choices that have no curve.
    points = [
        Line(f"{option.label}, at this KL", np.array([option.kl]), np.array([option.win_rate]), option is plan.best)
        for option in options
        if option is plan.best or option.label.startswith("top-1")
    ]
    left = transform_panel(
        [(option.label, option.transform) for option in options], f"Transforms at KL = {plan.best.kl:.3g}"
    )
    return left, frontier_panel(plan.procedure, named, 2.0 * plan.best.kl, plan.opponent, points)


def _channel_panels(plan: Plan, options: Sequence[Option]) -> tuple[Panel, Panel]:
    """The same for a policy of limited predictability: both limits, and every option at this KL."""
    curve = plan.frontier
    kls = np.linspace(0.0, np.sqrt(curve.kl[-1]), 200) ** 2
    line = Line(f"limit at predictability {plan.predictability:g} (Gaussian model)", kls, curve.at(kls), True)
    points = [Line(f"{one.label}, at this KL", np.array([one.kl]), np.array([one.win_rate])) for one in options]
    right = frontier_panel(plan.procedure, [], 2.0 * plan.best.kl, plan.opponent, [line, *points])
    ideal = replace(right.lines[0], label="idealised limit", emphasis=False)
    named = [(one.label, one.transform) for one in options]
    left = transform_panel(named, f"Transforms at KL = {plan.best.kl:.3g}")
    return left, replace(right, lines=(ideal, *right.lines[1:]))


def draw_plan(plan: Plan, path: str | Path) -> None:
    """Draw a plan into a file.

    Args:
        plan: From `infalign.plan`.
        path: Ends in .png, .svg or .html.

    Raises:
        InputError: If the ending is another one.
        StorageError: If the file cannot be written, or the drawing library is not installed.
    """
    check_ending(path)
    draw(plan_panels(plan), path)


def check_ending(path: str | Path) -> None:
    """Refuse a file name that cannot be drawn into."""
    if Path(path).suffix.lower() not in (".png", ".svg", ".html"):
        raise InputError(f"cannot draw into {str(path)!r}", where="--plot", hint="Use a name in .png, .svg or .html")


def draw(panels: Sequence[Panel], path: str | Path) -> None:
    """Draw panels side by side.

    Args:
        panels: What to draw.
        path: Ends in .png, .svg or .html.

    Raises:
        InputError: If the ending is another one, or the drawing library is not installed.
        StorageError: If the file cannot be written.
    """
    check_ending(path)
    target = Path(path)
    try:
        if target.suffix.lower() == ".html":
            _draw_html(panels, target)
        else:
            _draw_image(panels, target)
    except ImportError as error:
        raise InputError(
            f"drawing needs {error.name}, which is not installed", where="--plot", hint="Install infalign[report]"
        ) from error


def draw_gallery(folder: str | Path, ending: str = "svg") -> list[Path]:
    """The pictures of the theory page.

    Args:
        folder: Where to write.
        ending: svg, png or html.

    Returns:
        The files written.
    """
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    counts = (2, 4, 8, 16, 32, 64)
    transforms: list[Panel] = []
    for kind in (BestOfN, WorstOfN):
        named = [(kind(n).label, optimal_transform(kind(n), 0.1).transform) for n in counts]
        transforms.append(transform_panel(named, f"Optimal transforms, {kind(2).label[:-2]}-N, beta = 0.1", best=None))
    frontiers: list[Panel] = []
    for procedure, t in ((BestOfN(4), 10.0), (WorstOfN(4), -10.0)):
        named_transforms: list[tuple[str, RewardTransform]] = [
            ("identity", Identity()),
            ("log (Best-of-n distillation)", Log()),
            (f"exponential, t={t:g}", Exponential(t)),
            (f"exponential, t={-t:g}", Exponential(-t)),
        ]
        frontiers.append(frontier_panel(procedure, named_transforms, 2.0))
    written = [place / f"theory_transforms.{ending}", place / f"theory_frontiers.{ending}"]
    draw(transforms, written[0])
    draw(frontiers, written[1])
    return written


def _draw_image(panels: Sequence[Panel], path: Path) -> None:
    # A figure of its own, not pyplot: no global state, no display. A fixed hash salt makes the SVG reproducible.
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.hashsalt": "infalign", "svg.fonttype": "path"}):
        figure = Figure(figsize=(6.4 * len(panels), 4.6), layout="constrained")
        for axes, panel in zip(np.atleast_1d(figure.subplots(1, len(panels))), panels, strict=True):
            for line in panel.lines:
                style: dict[str, Any] = {
                    "linewidth": 2.6 if line.emphasis else 1.3,
                    "zorder": 3 if line.emphasis else 2,
                }
                if line.x.size == 1:
                    style.update(marker="o", linestyle="none", markersize=7 if line.emphasis else 5)
                elif line.emphasis:
                    style["color"] = "black"
                axes.plot(line.x, line.y, label=line.label, **style)
            axes.set(title=panel.title, xlabel=panel.x_label, ylabel=panel.y_label)
            axes.grid(alpha=0.25)
            axes.legend(fontsize=8, frameon=False)
        ending = path.suffix.lower().removeprefix(".")
        metadata = {"Date": None} if ending == "svg" else None
        write_file(path, partial(figure.savefig, format=ending, dpi=150, metadata=metadata), parents=False)


def _draw_html(panels: Sequence[Panel], path: Path) -> None:
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    figure = make_subplots(rows=1, cols=len(panels), subplot_titles=[panel.title for panel in panels])
    for column, panel in enumerate(panels, start=1):
        for line in panel.lines:
            figure.add_trace(
                go.Scatter(
                    x=line.x,
                    y=line.y,
                    name=line.label,
                    mode="markers" if line.x.size == 1 else "lines",
                    line={"width": 4 if line.emphasis else 2},
                    legendgroup=str(column),
                    legendgrouptitle={"text": panel.title},
                ),
                row=1,
                col=column,
            )
        figure.update_xaxes(title_text=panel.x_label, row=1, col=column)
        figure.update_yaxes(title_text=panel.y_label, row=1, col=column)
    figure.update_layout(template="plotly_white", hovermode="closest")
    write_text(path, figure.to_html(include_plotlyjs=True, full_html=True), parents=False)
