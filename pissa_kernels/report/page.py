"""A report as one HTML page that needs no network and no other file.

This module builds the data of the page. The template page.html.jinja includes page.css and page.js, and escapes all
text, because a layer may have any name.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..files.atomic import check_writable_target, write_text
from .figures import svg_data_uri
from .layer import TEXT_COLUMNS, LayerReport, layer_table, rank_range, shape_text
from .pictures import report_figures
from .report import REPORT_NAME, Report
from .spectrum import check_share, energy_of_all, least_ranks, peft_pattern, projection_ranks, suggestion

# Layers listed in the warning and in the table of the slowest layers.
LISTED = 5


class Table(NamedTuple):
    """A table of the page; the first cell of a row is the head of the row.

    Attributes:
        heads: head of each column.
        rows: cells as text, one for each head.
        left: indices of the columns of text; the others are numbers, aligned right.
    """

    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: Collection[int] = (0,)


def write_page(report: Report, path: str | Path, shares: Sequence[float] = (0.9,), title: str | None = None) -> None:
    """Write the report as an HTML file, atomically: a reader sees the old file or the new one.

    The same report gives the same bytes with the same versions of matplotlib and Jinja2.

    Args:
        report: a report with at least one layer.
        path: the file; a link is followed. An existing page is replaced.
        shares: shares of the captured energy to suggest ranks for, each above 0 and at most 1.
        title: title of the page, as plain text.

    Raises:
        ImportError: matplotlib or Jinja2 is not installed; the message names the extra.
        FileExistsError: there is something else than a web page at ``path``.
        OSError: the file cannot be written, or its folder does not exist.
        ValueError: the report has no layer, a share is out of range, or a number is NaN or infinite.
    """
    path = check_page(Path(path))
    write_text(path, render_page(report, shares, title))


def check_page(path: Path) -> Path:
    """Refuse a path that cannot become a page, or that holds anything else. Returns it with links followed."""
    return check_writable_target(path, "a web page", _is_page)


def _is_page(path: Path) -> bool:
    with path.open("rb") as file:
        start = file.read(1024).removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    return start.startswith((b"<!doctype html", b"<html"))


def render_page(report: Report, shares: Sequence[float] = (0.9,), title: str | None = None) -> str:
    """The text of the page, with the arguments and errors of :func:`write_page`."""
    layers = report.layers
    if not layers:
        raise ValueError("no layer was initialized, so there is nothing to show")
    for share in shares:
        check_share(share)
    template = _template()
    loose = [layer for layer in layers if not layer.certificate.converged]
    least_exact = sorted(loose, key=lambda layer: -layer.certificate.residual)
    page = template.render(
        title=title or "PiSSA initialization",
        count=len(layers),
        rank=rank_range(layers),
        energy=100 * energy_of_all(layers),
        residual=max(layer.certificate.residual for layer in layers),
        loose=len(loose),
        least_exact=least_exact[:LISTED],
        facts=_time_and_memory(report),
        slowest=_slowest(layers),
        pictures=_pictures(report, shares),
        suggestions=[suggestion(layers, share) for share in shares],
        projections=_projections(layers, shares),
        configs=[(100 * share, _config(layers, share)) for share in shares],
        layers=Table(*layer_table(layers), TEXT_COLUMNS),
        highlighted=[index for index, layer in enumerate(layers) if not layer.certificate.converged],
        inits=sorted({layer.init for layer in layers}),
        seeds=sorted({layer.seed for layer in layers}),
        report=report,
        file_name=REPORT_NAME,
    )
    return str(page)


def _template() -> Any:
    try:
        from jinja2 import Environment, PackageLoader, StrictUndefined
    except ImportError as error:
        raise ImportError(
            f"the page needs Jinja2 ({error}): pip install 'pissa-kernels[report]'", name="jinja2"
        ) from error
    environment = Environment(
        loader=PackageLoader("pissa_kernels", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    # The filter "tojson" escapes what this returns for a <script> element.
    environment.policies.update({"json.dumps_function": lambda report: report.to_json(), "json.dumps_kwargs": {}})
    return environment.get_template("page.html.jinja")


def _time_and_memory(report: Report) -> list[tuple[str, str]]:
    """Names and values of what was measured."""
    facts = [("sum over the layers", f"{sum(layer.seconds for layer in report.layers):.3f} s")]
    if report.seconds is not None:
        facts.insert(0, ("wall time in all", f"{report.seconds:.3f} s"))
    if report.peak_extra_bytes is not None:
        facts.append(("extra memory at the peak", f"{report.peak_extra_bytes / 2**20:.1f} MiB"))
    return facts


def _slowest(layers: Sequence[LayerReport]) -> Table:
    total = sum(layer.seconds for layer in layers) or 1.0
    rows = [
        [
            layer.name,
            shape_text(layer),
            layer.certificate.method,
            f"{1e3 * layer.seconds:.1f}",
            f"{100 * layer.seconds / total:.1f}",
        ]
        for layer in sorted(layers, key=lambda layer: -layer.seconds)[:LISTED]
    ]
    return Table(("layer", "shape", "method", "ms", "% of all layers"), rows, left=(0, 2))


def _pictures(report: Report, shares: Sequence[float]) -> dict[str, dict[str, str]]:
    """Source and alternative text of each picture, by its name."""
    least, most = (choose(report.layers, key=lambda layer: layer.certificate.energy) for choose in (min, max))
    alternatives = {
        "energy": "Heat map of the captured energy over projection and depth: "
        f"from {100 * least.certificate.energy:.1f} % in {least.name} "
        f"to {100 * most.certificate.energy:.1f} % in {most.name}",
        "spectra": "Curves of the singular values, relative to the largest of each layer, a panel for each projection",
        "ranks": "Curves of the captured energy against rank, a panel for each projection",
    }
    figures = report_figures(report, shares)
    return {name: {"src": svg_data_uri(figure), "alt": alternatives[name]} for name, figure in figures.items()}


def _projections(layers: Sequence[LayerReport], shares: Sequence[float]) -> Table:
    """The present rank of each projection, and the rank that keeps each share in all of its layers."""
    columns = [projection_ranks(layers, [layer.rank for layer in layers])]
    columns += [projection_ranks(layers, least_ranks(layers, share)) for share in shares]
    heads = ["projection", "rank now", *(f"for {100 * share:g} %" for share in shares)]
    return Table(heads, [[projection, *(str(column[projection]) for column in columns)] for projection in columns[0]])


def _config(layers: Sequence[LayerReport], share: float) -> str:
    """Python code of a PEFT configuration with the ranks that keep a share.

    PEFT scales a layer by alpha/r. The alphas change with the ranks, so each layer keeps its scaling.
    """
    ranks = least_ranks(layers, share)
    alphas = [layer.scaling * rank for layer, rank in zip(layers, ranks, strict=True)]
    rank, rank_pattern = peft_pattern(layers, ranks)
    alpha, alpha_pattern = peft_pattern(layers, alphas)
    lines = [
        "LoraConfig(",
        f"    r={rank},",
        f"    lora_alpha={alpha:.10g},",
        f'    init_lora_weights="{layers[0].init}",',
        *_argument("rank_pattern", rank_pattern),
        *_argument("alpha_pattern", alpha_pattern),
        "    # target_modules and all else as they were",
        ")",
    ]
    return "\n".join(lines)


def _argument(name: str, pattern: Mapping[str, float]) -> list[str]:
    """Lines of a keyword argument; none for an empty pattern. A JSON string is a Python string too."""
    if not pattern:
        return []
    items = [f"        {json.dumps(key, ensure_ascii=False)}: {value:.10g}," for key, value in pattern.items()]
    return [f"    {name}={{", *items, "    },"]
