"""The command ``pissa-kernels report``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pissa_kernels import Report
from pissa_kernels.cli import main as cli
from pissa_kernels.report import REPORT_NAME
from pissa_kernels.report.spectrum import suggestion

from ..support.reports import llama
from .test_demo import run

SMALL = llama(2)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An output folder with its report in the folder of a saved adapter."""
    (tmp_path / "out" / "pissa_init").mkdir(parents=True)
    SMALL.write(tmp_path / "out" / "pissa_init" / REPORT_NAME)
    return tmp_path / "out"


def test_table_and_ranks(folder: Path) -> None:
    done = run("report", folder)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{SMALL.table()}\n{suggestion(SMALL.layers, 0.9)}\n"
    assert run("report", folder / "pissa_init" / REPORT_NAME).stdout == done.stdout


def test_shares(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", "--share", "0.99", str(folder), "--share", "0.5"]) == 0
    assert capsys.readouterr().out.splitlines()[-2:] == [suggestion(SMALL.layers, share) for share in (0.5, 0.99)]


def test_json_is_only_the_report(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", str(folder), "--json"]) == 0
    output, error = capsys.readouterr()
    assert error == ""
    assert json.loads(output) == SMALL.to_dict()
    assert len(output.splitlines()) == 1


def test_an_empty_report_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Report().write(tmp_path / REPORT_NAME)
    assert cli.main(["report", str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "no layer was initialized"
    assert cli.main(["report", str(tmp_path), "--pictures", str(tmp_path / "drawn")]) == 1
    assert "nothing to show" in capsys.readouterr().err
    assert not (tmp_path / "drawn").exists()


def test_pictures(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib", reason="the pictures need matplotlib")
    drawn = tmp_path / "a" / "drawn"
    assert cli.main(["report", str(folder), "--pictures", str(drawn)]) == 0
    names = [drawn / name for name in ("energy.png", "spectra.png", "ranks.png")]
    assert capsys.readouterr().out.splitlines()[-3:] == [f"drew {name}" for name in names]
    assert sorted(drawn.iterdir()) == sorted(names)
    assert cli.main(["report", str(folder), "--pictures", str(drawn), "--svg", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == SMALL.to_dict()
    assert (drawn / "ranks.svg").is_file()


def test_page(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib", reason="the page has pictures, which need matplotlib")
    pytest.importorskip("jinja2", reason="the page is a template of Jinja2")
    page = tmp_path / "page.html"
    assert cli.main(["report", str(folder), "--html", str(page), "--share", "0.5"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2:] == [suggestion(SMALL.layers, 0.5), f"wrote {page}"]
    text = page.read_text(encoding="utf-8")
    assert "<h1>PiSSA initialization of out</h1>" in text
    assert suggestion(SMALL.layers, 0.5) in text
    assert cli.main(["report", str(folder), "--html", str(page), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == SMALL.to_dict()
    Report().write(tmp_path / "empty.json")
    assert cli.main(["report", str(tmp_path / "empty.json"), "--html", str(tmp_path / "none.html")]) == 1
    assert "nothing to show" in capsys.readouterr().err
    assert not (tmp_path / "none.html").exists()


@pytest.mark.parametrize(
    ("package", "option"), [("matplotlib", "--pictures"), ("matplotlib", "--html"), ("jinja2", "--html")]
)
def test_without_a_package_of_the_extra(
    package: str,
    option: str,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    assert cli.main(["report", str(folder), option, str(tmp_path / "drawn")]) == 1
    output, error = capsys.readouterr()
    assert output == ""
    assert len(error.splitlines()) == 1
    assert "pip install 'pissa-kernels[report]'" in error
    assert "demo" not in error
    assert not (tmp_path / "drawn").exists()
    assert cli.main(["report", str(folder)]) == 0, "the table needs no extra"


def test_needs_neither_peft_nor_transformers(folder: Path) -> None:
    code = (
        "import sys; "
        "sys.modules.update(dict.fromkeys(['peft', 'transformers', 'tqdm', 'tabulate', 'matplotlib', 'jinja2'])); "
        "from pissa_kernels.cli import main as cli; sys.exit(cli.main(sys.argv[1:]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "report", str(folder)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "14 layers, rank 16" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["/nowhere"], 2, "/nowhere does not exist"),
        (["EMPTY"], 2, "holds no report: neither pissa_report.json nor pissa_init/pissa_report.json"),
        (["TRUNCATED"], 1, "is not a report: not JSON"),
        (["OTHER"], 1, "accepted is an object with format 'pissa_kernels report', version 1"),
        (["REPORT", "--share", "90"], 2, "above 0 and at most 1, as in 0.9; got 90"),
        (["REPORT", "--share", "nan"], 2, "got nan"),
        (["REPORT", "--share", "most"], 2, "could not convert string to float: 'most'"),
        (["REPORT", "--pictures", "REPORT"], 2, "report exists and is not a folder; give the name of a folder"),
        (["REPORT", "--html", "REPORT"], 2, "report exists and is not a web page, so it is not replaced"),
        (["REPORT", "--html", "OTHER", "--pictures", "EMPTY"], 2, "other exists and is not a web page"),
        (["REPORT", "--html", "/nowhere/page.html"], 2, "cannot write page.html: the folder /nowhere does not exist"),
        (["REPORT", "--html", "EMPTY"], 2, "is a folder"),
        ([], 2, "SOURCE"),
    ],
)
def test_mistakes_get_one_line(
    arguments: list[str], code: int, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = {name: tmp_path / name.lower() for name in ("EMPTY", "TRUNCATED", "OTHER", "REPORT")}
    paths["EMPTY"].mkdir()
    paths["TRUNCATED"].write_text(SMALL.to_json()[:-100])
    paths["OTHER"].write_text('{"weight_map": {}}')
    SMALL.write(paths["REPORT"])
    before = {path: os.stat(path).st_mtime_ns for path in tmp_path.iterdir()}
    try:
        found = cli.main(["report", *(str(paths.get(argument, argument)) for argument in arguments)])
    except SystemExit as stopped:
        found = stopped.code
    output, error = capsys.readouterr()
    assert found == code
    assert output == ""
    lines = [line for line in error.splitlines() if "error: " in line]
    assert len(lines) == 1
    assert words in lines[0]
    assert {path: os.stat(path).st_mtime_ns for path in tmp_path.iterdir()} == before
