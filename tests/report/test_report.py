"""Reports as tables and files: a written report is read back exactly, and other files are refused."""

from __future__ import annotations

import json
import math
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pissa_kernels import Certificate, LayerReport, Report, __version__, truncated_svd
from pissa_kernels.report import REPORT_NAME, find_report
from pissa_kernels.report.layer import HEADS

from ..support.reports import layer, llama

non_negative = st.floats(0, allow_nan=False, allow_infinity=False)


@st.composite
def layers(draw: st.DrawFn) -> LayerReport:
    sigma = draw(st.lists(st.floats(0, allow_nan=False, allow_infinity=False, width=32), min_size=1, max_size=9))
    return LayerReport(
        name=draw(st.text()),
        shape=(draw(st.integers(len(sigma), 2**40)), draw(st.integers(len(sigma), 2**40))),
        rank=len(sigma),
        certificate=Certificate(
            draw(st.integers(0)), draw(non_negative), draw(non_negative), draw(st.booleans()), draw(st.text())
        ),
        seconds=draw(non_negative),
        singular_values=torch.tensor(sigma, dtype=torch.float32),
        dtype=draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16])),
        scaling=draw(st.floats(0, exclude_min=True, allow_nan=False, allow_infinity=False)),
        init=draw(st.one_of(st.just("pissa"), st.integers(0).map("pissa_niter_{}".format))),
        seed=draw(st.integers()),
    )


@given(
    st.builds(
        Report,
        layers=st.lists(layers(), max_size=3),
        seconds=st.none() | non_negative,
        peak_extra_bytes=st.none() | st.integers(0),
        package_version=st.text(),
        torch_version=st.text(),
    )
)
def test_json_round_trip(written: Report) -> None:
    found = Report.from_dict(json.loads(written.to_json()))
    for name in ("seconds", "peak_extra_bytes", "package_version", "torch_version"):
        assert getattr(found, name) == getattr(written, name)
    assert len(found.layers) == len(written.layers)
    for ours, theirs in zip(found.layers, written.layers, strict=True):
        for name in ("name", "shape", "rank", "certificate", "seconds", "dtype", "scaling", "init", "seed"):
            assert getattr(ours, name) == getattr(theirs, name)
        assert ours.singular_values.dtype == torch.float32
        assert torch.equal(ours.singular_values, theirs.singular_values)


def test_the_file_has_the_documented_keys(tmp_path: Path) -> None:
    Report([layer("q", (1 / 3,))], seconds=1.5, peak_extra_bytes=7).write(tmp_path / REPORT_NAME)
    record = json.loads((tmp_path / REPORT_NAME).read_text())
    assert record == {
        "format": "pissa_kernels report",
        "version": 1,
        "package": __version__,
        "torch": torch.__version__,
        "seconds": 1.5,
        "peak_extra_bytes": 7,
        "layers": [
            {
                "name": "q",
                "shape": [64, 48],
                "dtype": "bfloat16",
                "rank": 1,
                "scaling": 1.0,
                "init": "pissa",
                "seed": 0,
                "seconds": 0.25,
                "singular_values": [float(torch.tensor(1 / 3))],
                "certificate": {
                    "passes": 11, "energy": 0.5, "residual": 2e-6, "converged": True, "method": "krylov",
                },
            }
        ],
    }  # fmt: skip
    assert (tmp_path / REPORT_NAME).stat().st_mode & 0o777 == 0o644


def test_a_real_svd_is_written_and_read(tmp_path: Path) -> None:
    weight = torch.randn(40, 30, generator=torch.Generator().manual_seed(0))
    for matrix in (weight, torch.zeros(40, 30)):
        svd = truncated_svd(matrix, 5)
        entry = layer("w", shape=(40, 30), rank=5, singular_values=svd.S, certificate=svd.certificate)
        Report([entry]).write(tmp_path / "a.json")
        found = Report.read(tmp_path / "a.json").layers[0]
        assert torch.equal(found.singular_values, svd.S)
        assert found.certificate == svd.certificate


def test_versions_survive_reading_and_writing(tmp_path: Path) -> None:
    Report([], package_version="0.0.1", torch_version="2.10").write(tmp_path / "a.json")
    Report.read(tmp_path / "a.json").write(tmp_path / "b.json")
    assert (tmp_path / "b.json").read_text() == (tmp_path / "a.json").read_text()
    assert '"package": "0.0.1"' in (tmp_path / "b.json").read_text()


def test_a_subclass_reads_plain_reports(tmp_path: Path) -> None:
    """Constructing a subclass may start work, which reading a file must not do."""

    class Working(Report):
        def __init__(self) -> None:
            raise AssertionError("reading must not construct the subclass")

    Report([layer("q")]).write(tmp_path / "a.json")
    assert type(Working.read(tmp_path / "a.json")) is Report


@pytest.mark.parametrize("broken", ["write", "replace"])
def test_a_failed_write_leaves_the_old_file(broken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    Report([layer("old")]).write(path)

    def fail(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(os, {"write": "fsync", "replace": "replace"}[broken], fail)
    with pytest.raises(OSError, match="No space"):
        Report([layer("new")]).write(path)
    monkeypatch.undo()
    assert [entry.name for entry in Report.read(path).layers] == ["old"]
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0])
def test_an_unreadable_report_is_not_written(value: float, tmp_path: Path) -> None:
    for bad in (
        Report([layer("q", seconds=value)]),
        Report([layer("q", (1.0, value))]),
        Report([layer("q", energy=value)]),
        Report([layer("q")], seconds=value),
    ):
        with pytest.raises(ValueError, match="accepted is"):
            bad.write(tmp_path / "a.json")
    assert list(tmp_path.iterdir()) == []


def changed(*keys: str | int, value: Any) -> str:
    record = Report([layer("q"), layer("k")], seconds=1.0).to_dict()
    part: Any = record
    for key in keys[:-1]:
        part = part[key]
    if value is KeyError:
        del part[keys[-1]]
    else:
        part[keys[-1]] = value
    return json.dumps(record)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "not JSON: Expecting value"),
        (Report([layer("q")]).to_json()[:-20], "not JSON"),
        ("[" * 100_000, "nested too deeply"),
        ("[1, 2]", "found an array of 2; accepted is an object with format 'pissa_kernels report', version 1"),
        ("null", "found null"),
        ("{}", "found format null, version null"),
        (changed("version", value=2), 'found format "pissa_kernels report", version 2; accepted is'),
        (changed("format", value="safetensors"), 'found format "safetensors", version 1'),
        (changed("format", value=100 * "x"), 'found format "' + 58 * "x" + "…, version 1"),
        (changed("seconds", value=KeyError), "the report lacks keys: 'seconds'; accepted are format, version"),
        (changed("author", value="x"), "the report has unknown keys: 'author'; accepted are format, version"),
        (changed("seconds", value="1"), 'the report: seconds is "1"; accepted is a finite number ≥ 0, or null'),
        (changed("seconds", value=math.nan), "NaN is not a JSON number"),
        (changed("seconds", value=True), "seconds is true"),
        (changed("peak_extra_bytes", value=1.5), "peak_extra_bytes is 1.5; accepted is an integer ≥ 0, or null"),
        (changed("layers", value={}), "layers is an object of 0; accepted is an array"),
        (changed("layers", 1, value=3), "layers[1] must be an object, found 3"),
        (changed("layers", 1, "shape", value=[3]), "layers[1]: shape is an array of 1; accepted is [out, in]"),
        (changed("layers", 0, "dtype", value="int8"), "one of 'float32', 'float16', 'bfloat16'"),
        (changed("layers", 0, "dtype", value=["float32"]), "dtype is an array of 1"),
        (changed("layers", 0, "rank", value=0), "layers[0]: rank is 0; accepted is an integer ≥ 1"),
        (changed("layers", 0, "rank", value=2), "layers[0] has 3 singular values, rank 2"),
        (changed("layers", 0, "shape", value=[2, 9]), "a rank up to the smaller side of the shape"),
        (changed("layers", 0, "singular_values", value=[1e39, 1, 1]), "finite float32 numbers"),
        (changed("layers", 0, "singular_values", 0, value=None), "finite float32 numbers"),
        (changed("layers", 0, "scaling", value=0), "scaling is 0; accepted is a finite number > 0"),
        (changed("layers", 0, "init", value="pissa_16"), "accepted is 'pissa' or 'pissa_niter_N'"),
        (changed("layers", 0, "certificate", "energy", value=KeyError), "layers[0].certificate lacks keys: 'energy'"),
        (changed("layers", 0, "certificate", "converged", value=1), "converged is 1; accepted is true or false"),
        (
            changed("layers", 0, "seconds", value=0).replace('"seconds": 0,', '"seconds": 1e999,'),
            "accepted is a finite",
        ),
    ],
)
def test_a_wrong_file_is_one_clear_error(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match="is not a report") as raised:
        Report.read(tmp_path / "a.json")
    message = str(raised.value)
    assert words in message
    assert message.startswith(f"{tmp_path / 'a.json'} is not a report: ")
    assert "\n" not in message


def test_a_binary_file_is_not_a_report(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"a\.json is not a report: .*utf-8"):
        Report.read(tmp_path / "a.json")


def test_finding_the_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds no report: neither pissa_report\.json nor pissa_init/"):
        find_report(tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        find_report(tmp_path / "nowhere")
    (tmp_path / "pissa_init").mkdir()
    inner = tmp_path / "pissa_init" / REPORT_NAME
    inner.touch()
    assert find_report(tmp_path) == find_report(tmp_path / "pissa_init") == inner
    (tmp_path / REPORT_NAME).touch()
    assert find_report(str(tmp_path)) == tmp_path / REPORT_NAME
    assert find_report(inner) == inner


def test_table() -> None:
    loose = Certificate(7, 0.25, 1.5e-3, False, "chebyshev")
    text = Report([layer("a.q_proj"), layer("lm_head", certificate=loose, seconds=1.0, dtype=torch.float32)]).table()
    heads, dashes, first, second, blank, total = text.splitlines()
    assert re.split("  +", heads) == list(HEADS)
    assert set(dashes) == {"-", " "}
    assert " ".join(first.split()) == "a.q_proj 64×48 bfloat16 3 50.00 4 1 2e-06 11 krylov yes 250.0"
    assert " ".join(second.split()) == "lm_head 64×48 float32 3 25.00 4 1 2e-03 7 chebyshev NO 1000.0"
    assert blank == ""
    # Σσ² is 21 in both layers, ‖W‖² is 42 and 84.
    assert total == "2 layers, rank 3, 33.33 % of the energy, residual/σ₁ ≤ 2e-03, 1 not converged, 1.250 s in layers"
    assert len({line.index(word) for line, word in ((heads, "method"), (first, "krylov"), (second, "chebyshev"))}) == 1
    assert all(line == line.rstrip() for line in text.splitlines())


def test_summary_of_all_kinds() -> None:
    assert Report().summary() == "no layer was initialized"
    assert Report().table().splitlines()[-1] == "no layer was initialized"
    whole = Report([layer("q", (1.0,))], seconds=2.0, peak_extra_bytes=3 * 2**19)
    assert whole.summary().startswith("1 layer, rank 1, 50.00 % of the energy, residual/σ₁ ≤ 2e-06, all converged")
    assert whole.summary().endswith("0.250 s in layers, 2.000 s in all, 1.5 MiB extra at the peak")
    assert "rank 1 to 3" in Report([layer("q", (1.0,)), layer("k")]).summary()
    assert repr(llama(2)) == f"<Report: {llama(2).summary()}>"


def test_reports_do_not_share_layers() -> None:
    one, other = Report(), Report()
    one.layers.append(layer("q"))
    assert other.layers == []


def test_pickled_models_find_the_class_of_a_layers_report() -> None:
    assert (LayerReport.__module__, LayerReport.__qualname__) == ("pissa_kernels.report.layer", "LayerReport")
