"""Draw a calibration report: are the held-out references uniform, all together and prompt by prompt?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from infalign._io.wording import counted
from infalign.calibration.report import CalibrationReport
from infalign.errors import InputError

_BLUE, _GREY = "#2f6db5", "#8a919e"


def calibration_lines(report: CalibrationReport) -> list[str]:
    """The report in one or two lines for a terminal; it names what is wrong and leaves out what is fine."""
    surprising = min(report.held_out_p_value, report.worst_prompt_p_value) < 0.001
    lines = [
        f"Held-out references: mean {report.held_out_mean:.4f} ± {report.held_out_standard_error:.4f} "
        f"(½ expected, p = {report.held_out_p_value:.2g}); {report.effective_num_ref:.1f} levels of {report.num_ref}; "
        f"{100 * report.drift:.0f} % of the rewards' variance lies between prompts"
    ]
    if report.constant_prompts:
        lines.append(f"{report.constant_prompts} of {counted(report.num_prompts, 'prompt')} "
                     f"{'has' if report.constant_prompts == 1 else 'have'} one reward for every response: "
                     "nothing can be learned from them")  # fmt: skip
    if surprising:
        lines.append("The later references do not look like draws of the same policy under the same reward as the "
                     f"earlier ones (prompt {report.worst_prompt}: p = {report.worst_prompt_p_value:.2g})")  # fmt: skip
    return lines


class CalibrationDisplay:
    """Two panels of a `CalibrationReport`, in the manner of scikit-learn's displays.

    Left: where the held-out references fall among the fitted ones, with two standard errors of the uniform. Right:
    how far each prompt's own mean is off, in standard errors, against the normal distribution.

    Args:
        report: What to draw.

    Attributes:
        figure_: The matplotlib figure, after `plot`.
        axes_: Its two panels, after `plot`.

    Example:
        >>> CalibrationDisplay.from_report(report).plot().figure_.savefig("calibration.png")  # doctest: +SKIP
    """

    figure_: Any
    axes_: tuple[Any, Any]

    def __init__(self, report: CalibrationReport) -> None:
        self.report = report

    @classmethod
    def from_report(cls, report: CalibrationReport) -> CalibrationDisplay:
        """The display of a report."""
        return cls(report)

    def plot(self, axes: Sequence[Any] | None = None) -> CalibrationDisplay:
        """Draw.

        Args:
            axes: Two matplotlib axes to draw on; by default a new figure.

        Returns:
            The display itself.

        Raises:
            InputError: Matplotlib is not installed, or there are not two axes.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise InputError("matplotlib is not installed", where="CalibrationDisplay",
                             hint="pip install 'infalign[report]'") from error  # fmt: skip
        new = axes is None
        panels: Any = Figure(figsize=(9.0, 3.6), layout="constrained", dpi=160).subplots(1, 2) if new else axes
        if len(panels) != 2:
            raise InputError(f"there are {len(panels)} axes", where="CalibrationDisplay.plot", hint="Give two")
        self._plot_shares(panels[0])
        self._plot_prompts(panels[1])
        self.axes_, self.figure_ = (panels[0], panels[1]), panels[0].figure
        return self

    def _plot_shares(self, axes: Any) -> None:
        report = self.report
        expected = np.array(report.expected_shares)
        density, error = np.array(report.rank_shares) / expected, np.array(report.share_standard_errors) / expected
        edges = np.concatenate([[0.0], np.cumsum(expected)])
        axes.stairs(1.0 + 2.0 * error, edges, baseline=1.0 - 2.0 * error, fill=True, color=_GREY, alpha=0.35,
                    label="uniform, ±2 standard errors")  # fmt: skip
        axes.stairs(density, edges, baseline=None, color=_BLUE, linewidth=2, label="held-out references")
        axes.set(
            xlim=(0, 1),
            ylim=(0, 1.2 * max(density.max(), (1.0 + 2.0 * error).max())),
            xlabel="calibrated reward",
            ylabel="density",
        )
        axes.set_title(f"All prompts: mean {report.held_out_mean:.4f} ± {report.held_out_standard_error:.4f}, "
                       f"p = {report.held_out_p_value:.2g}", fontsize="medium")  # fmt: skip
        axes.legend(frameon=False, fontsize="small", loc="lower center")

    def _plot_prompts(self, axes: Any) -> None:
        from scipy.special import ndtri

        report = self.report
        found = np.array(report.prompt_scores)
        normal = ndtri(np.arange(1, found.size + 1) / (found.size + 1))
        axes.plot(normal, normal, color=_GREY, linewidth=1, label="nothing changed")
        axes.plot(normal, found, "o", color=_BLUE, markersize=4, label="prompts, 5 % to 95 %")
        axes.set(xlabel="normal quantile", ylabel="prompt's mean − ½, standard errors")
        axes.set_title(f"Prompt by prompt: worst is {report.worst_prompt}, p = {report.worst_prompt_p_value:.2g} "
                       f"of {report.num_prompts}", fontsize="medium")  # fmt: skip
        axes.legend(frameon=False, fontsize="small", loc="upper left")
