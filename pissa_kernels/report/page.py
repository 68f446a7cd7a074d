"""A report as one HTML page that needs no network and no other file.

The words that never change, the looks and the behaviour are in page.html, page.css and page.js. What a report brings in
is escaped here, where it becomes HTML: a layer may have any name.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template

from ..files.atomic import check_writable_target, write_text
from .inline import svg_element
from .layer import HEADS, TEXT_COLUMNS, LayerReport, layer_row
from .pictures import energy_figure, ranks_figure, spectra_figure
from .report import REPORT_NAME, Report
from .spectrum import check_share, energy_of_all, least_rank, peft_pattern, projection_ranks, suggestion

# So many layers are named where only the first few matter.
NAMED = 5


def write_page(report: Report, path: str | Path, shares: Sequence[float] = (0.9,), title: str | None = None) -> None:
    """Write the report as one HTML file; whoever reads ``path`` meanwhile finds the old file or the new one.

    The same report gives the same bytes, under the same version of matplotlib.

    Args:
        report: with at least one layer.
        path: of the file; one that is there is replaced.
        shares: of the captured energy, to suggest ranks for; each above 0 and at most 1.
        title: of the page, as plain text.

    Raises:
        ImportError: matplotlib is not installed; the message names the extra.
        OSError: the file cannot be written, or its folder does not exist.
        ValueError: no layer, a share out of range, or what JSON does not have, such as a NaN.
    """
    path = Path(path)
    check_writable_target(path)
    write_text(path, render_page(report, shares, title))


def render_page(report: Report, shares: Sequence[float] = (0.9,), title: str | None = None) -> str:
    """The text of the page that :func:`write_page` writes, with its arguments and its errors."""
    layers = report.layers
    if not layers:
        raise ValueError("no layer was initialised, so there is nothing to show")
    for share in shares:
        check_share(share)
    loose = [index for index, layer in enumerate(layers) if not layer.certificate.converged]
    parts = {
        **_pictures(report, shares),
        "title": escape(title or "PiSSA initialisation"),
        "lead": escape(_lead(layers)),
        "verdict": _verdict(len(loose), len(layers)),
        "warning": _warning([layers[index] for index in loose]),
        "tiles": _tiles(report),
        "slowest": _slowest(layers),
        "suggestions": "\n".join(f"<p>{escape(suggestion(layers, share))}.</p>" for share in shares),
        "projections": _projections(layers, shares),
        "configs": "\n".join(_config(layers, share, share == shares[0]) for share in shares),
        "layers": _table(HEADS, [layer_row(layer) for layer in layers], TEXT_COLUMNS, name="layers", loose=loose),
        "provenance": escape(_provenance(report)),
        "filename": REPORT_NAME,
        "json": _json_in_html(report),
        "style": _resource("page.css"),
        "script": _resource("page.js"),
    }
    return Template(_resource("page.html")).substitute(parts)


def _resource(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")


def _json_in_html(report: Report) -> str:
    """The report's JSON without a character that HTML would take for markup: inside of strings, \\u003c is the same."""
    return report.to_json().translate({ord(mark): f"\\u{ord(mark):04x}" for mark in "<>&"})


def _lead(layers: Sequence[LayerReport]) -> str:
    """One sentence on all layers together."""
    ranks = sorted({layer.rank for layer in layers})
    subject = "1 layer holds" if len(layers) == 1 else f"{len(layers)} layers hold"
    rank = f"rank {ranks[0]}" + (f" to {ranks[-1]}" if len(ranks) > 1 else "")
    worst = max(layer.certificate.residual for layer in layers)
    return f"{subject} {100 * energy_of_all(layers):.2f} % of the energy at {rank}, with residual/σ₁ ≤ {worst:.0e}."


def _verdict(loose: int, count: int) -> str:
    if loose:
        return f'<strong class="badge loose">{loose} of {count} not converged</strong>'
    return '<strong class="badge good">all converged</strong>'


def _warning(loose: Sequence[LayerReport]) -> str:
    """The layers that have not converged, the least exact first; empty where all have."""
    if not loose:
        return ""
    worst = sorted(loose, key=lambda layer: -layer.certificate.residual)
    items = [
        f"<li><code>{escape(layer.name)}</code>: residual/σ₁ {layer.certificate.residual:.0e}, "
        f"{layer.certificate.passes} passes</li>"
        for layer in worst[:NAMED]
    ]
    if len(worst) > NAMED:
        items.append(f'<li>and {len(worst) - NAMED} more, marked in <a href="#layers">the table</a></li>')
    return (
        '<div class="warning" role="note">\n'
        "<p><strong>Not converged:</strong> the energy that was missed is, by estimate, above the tolerance.</p>\n"
        f"<ul>\n{chr(10).join(items)}\n</ul>\n</div>"
    )


def _tiles(report: Report) -> str:
    """Time and memory; what was not measured is left out."""
    facts = [("sum over the layers", f"{sum(layer.seconds for layer in report.layers):.3f} s")]
    if report.seconds is not None:
        facts.insert(0, ("wall time in all", f"{report.seconds:.3f} s"))
    if report.peak_extra_bytes is not None:
        facts.append(("extra memory at the peak", f"{report.peak_extra_bytes / 2**20:.1f} MiB"))
    return "\n".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in facts)


def _slowest(layers: Sequence[LayerReport]) -> str:
    total = sum(layer.seconds for layer in layers) or 1.0
    rows = [
        [
            layer.name,
            "×".join(map(str, layer.shape)),
            layer.certificate.method,
            f"{1e3 * layer.seconds:.1f}",
            f"{100 * layer.seconds / total:.1f}",
        ]
        for layer in sorted(layers, key=lambda layer: -layer.seconds)[:NAMED]
    ]
    return _table(("layer", "shape", "method", "ms", "% of all layers"), rows, left=(0, 2))


def _pictures(report: Report, shares: Sequence[float]) -> dict[str, str]:
    """The pictures by their place in the page, each with what it shows in words."""
    least, most = (choose(report.layers, key=lambda layer: layer.certificate.energy) for choose in (min, max))
    energy = (
        f"Heat map of the captured energy over projection and depth: from {100 * least.certificate.energy:.1f} % in "
        f"{least.name} to {100 * most.certificate.energy:.1f} % in {most.name}"
    )
    spectra = "Curves of the singular values, relative to the largest of each layer, a panel for each projection"
    ranks = "Curves of the captured energy against rank, a panel for each projection"
    return {
        "energy": svg_element(energy_figure(report), "energy", energy),
        "spectra": svg_element(spectra_figure(report), "spectra", spectra),
        "ranks": svg_element(ranks_figure(report, shares), "ranks", ranks),
    }


def _least_ranks(layers: Sequence[LayerReport], share: float) -> list[int]:
    return [least_rank(layer, share) or layer.rank for layer in layers]


def _projections(layers: Sequence[LayerReport], shares: Sequence[float]) -> str:
    """A row for each projection: its rank as it was run, and the one that keeps each share in all of its layers."""
    columns = [projection_ranks(layers, [layer.rank for layer in layers])]
    columns += [projection_ranks(layers, _least_ranks(layers, share)) for share in shares]
    heads = ["projection", "rank now", *(f"for {100 * share:g} %" for share in shares)]
    rows = [[projection, *(str(column[projection]) for column in columns)] for projection in columns[0]]
    return _table(heads, rows)


def _config(layers: Sequence[LayerReport], share: float, unfolded: bool) -> str:
    """The ranks that keep a share, as Python to copy.

    PEFT scales a layer by alpha / r, so that alphas go with the ranks to leave each layer its scaling.
    """
    ranks = _least_ranks(layers, share)
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
    details = "<details open>" if unfolded else "<details>"
    return (
        f"{details}\n<summary>PEFT configuration that keeps {100 * share:g} % of the captured energy</summary>\n"
        f'<div class="copyable"><pre tabindex="0"><code>{escape(chr(10).join(lines))}</code></pre></div>\n</details>'
    )


def _argument(name: str, pattern: Mapping[str, float]) -> list[str]:
    """Lines of a keyword argument; none for an empty dictionary. A string of JSON is one of Python, too."""
    if not pattern:
        return []
    items = [f"        {json.dumps(key, ensure_ascii=False)}: {value:.10g}," for key, value in pattern.items()]
    return [f"    {name}={{", *items, "    },"]


def _provenance(report: Report) -> str:
    """What was asked for and what did it."""
    inits = ", ".join(sorted({layer.init for layer in report.layers}))
    seeds = sorted({layer.seed for layer in report.layers})
    return (
        f"{inits}, seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}; "
        f"pissa_kernels {report.package_version}, torch {report.torch_version}."
    )


def _table(
    heads: Sequence[str],
    rows: Sequence[Sequence[str]],
    left: Collection[int] = (0,),
    name: str = "",
    loose: Collection[int] = (),
) -> str:
    """Rows as a table; the first cell of each is its head.

    Args:
        heads: one for each column.
        rows: cells as plain text, as many in a row as there are heads.
        left: indices of the columns of text; all others are numbers, and aligned to the right.
        name: the table's id.
        loose: indices of the rows to highlight.
    """
    kinds = ["" if column in left else ' class="number"' for column in range(len(heads))]
    head = "".join(f'<th scope="col"{kind}>{escape(cell)}</th>' for kind, cell in zip(kinds, heads, strict=True))
    lines = [f'<table id="{name}">' if name else "<table>", f"<thead><tr>{head}</tr></thead>", "<tbody>"]
    for index, (first, *rest) in enumerate(rows):
        cells = "".join(f"<td{kind}>{escape(cell)}</td>" for kind, cell in zip(kinds[1:], rest, strict=True))
        highlight = ' class="loose"' if index in loose else ""
        lines.append(f'<tr{highlight}><th scope="row"{kinds[0]}>{escape(first)}</th>{cells}</tr>')
    return "\n".join([*lines, "</tbody>", "</table>"])
