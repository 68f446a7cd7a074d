"""Pictures over the index of a singular value: spectra, and the energy that lower ranks would have captured."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from typing import Any

import numpy as np

from .figures import panels
from .layer import LayerReport
from .names import arrange
from .report import Report
from .spectrum import check_share, cumulative_energy, least_ranks, projection_ranks

SHARE_COLOR = "#D55E00"  # vermilion of Okabe and Ito's palette, which viridis does not contain
SHARE_STYLES = ("--", ":", "-.")
# Within this factor, plain numbers on a logarithmic axis are easier to read than powers of ten.
PLAIN_RANGE = 50.0


def spectra_figure(report: Report) -> Any:
    """Spectra σᵢ/σ₁ on a logarithmic scale: a panel for each projection, a line for each depth.

    Returns:
        A ``matplotlib.figure.Figure``. A singular value of zero is NaN and not drawn.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: the report has no layer.
    """
    grid = arrange(report.layers)
    figure, axes = panels(grid, _relative_spectrum, "index i")
    lowest = min(
        (float(np.nanmin(line)) for line in map(_relative_spectrum, report.layers) if np.isfinite(line).any()),
        default=1.0,
    )
    for projection, panel in axes.items():
        panel.set_yscale("log")
        zeros = [depth for depth, layer in grid.of(projection) if float(layer.singular_values[0]) == 0]
        if zeros:
            depths = ", ".join(str(depth) for depth in zeros if depth is not None)
            text = "σ = 0" + (f" at depth {depths}" if depths else "")
            panel.text(0.5, 0.06, text, transform=panel.transAxes, ha="center", fontsize=8, color="0.3")
    first = next(iter(axes.values()))  # the panels share their scales
    first.set_ylim(min(0.9 * lowest, 0.5), 1.1)
    if lowest > 1 / PLAIN_RANGE:
        _plain_numbers(first.yaxis)
    figure.suptitle("Singular values, relative to the largest of each layer", fontsize=11)
    figure.supylabel("σᵢ / σ₁", fontsize=9)
    return figure


def ranks_figure(report: Report, shares: Sequence[float] = (0.9,)) -> Any:
    """Cumulative captured energy in % of ‖W‖_F² against rank: a panel for each projection, a line for each depth.

    For each share, a dot on each curve marks the least rank that keeps the share of that layer's captured energy, and a
    vertical line the rank that keeps it in every layer of the projection.

    Returns:
        A ``matplotlib.figure.Figure``.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: the report has no layer, or a share is out of range.
    """
    for share in shares:
        check_share(share)
    grid = arrange(report.layers)
    marks = {share: projection_ranks(report.layers, least_ranks(report.layers, share)) for share in shares}
    notes = {
        projection: "r = " + ", ".join(str(most[projection]) for most in marks.values()) if marks else ""
        for projection in grid.projections
    }

    def percent(layer: LayerReport) -> Any:
        return 100 * cumulative_energy(layer).numpy()

    figure, axes = panels(grid, percent, "rank", notes, lines_below=len(marks))
    legend = []
    for style, (share, most) in zip(cycle(SHARE_STYLES), marks.items(), strict=False):
        for projection, panel in axes.items():
            line = panel.axvline(most[projection], color=SHARE_COLOR, linestyle=style, linewidth=1.2, zorder=1)
            layers = [layer for _, layer in grid.of(projection)]
            ranks = least_ranks(layers, share)
            heights = [percent(layer)[rank - 1] for layer, rank in zip(layers, ranks, strict=True)]
            panel.plot(ranks, heights, ".", color=SHARE_COLOR, markersize=3.5, zorder=3)
        legend.append(line)
        line.set_label(f"rank that keeps {100 * share:g} % of the captured energy in every layer of the panel")
    first = next(iter(axes.values()))  # the panels share their scales
    first.set_ylim(bottom=0)
    if legend:
        figure.legend(handles=legend, loc="outside lower center", frameon=False, fontsize=8)
    figure.suptitle("Energy that lower ranks would have captured", fontsize=11)
    figure.supylabel("captured energy, % of ‖W‖²", fontsize=9)
    return figure


def _relative_spectrum(layer: LayerReport) -> Any:
    """σᵢ/σ₁, (r,) float64; NaN where σᵢ is 0."""
    sigma = layer.singular_values.double().numpy()
    return np.divide(sigma, sigma[0], out=np.full_like(sigma, np.nan), where=sigma > 0)


def _plain_numbers(axis: Any) -> None:
    """Label a logarithmic axis with numbers such as 0.2 and 0.5."""
    from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 3.0, 5.0)))
    axis.set_major_formatter(FormatStrFormatter("%g"))
    axis.set_minor_formatter(NullFormatter())
