"""The GPU's schedule on known spectra, and what the ledger predicts for it."""

from __future__ import annotations

import pytest
import torch

from bench.__main__ import main
from bench.ledger import run
from bench.ledger.models import MODELS
from bench.ledger.roofline import H100
from bench.tools import schedule
from pissa_kernels.svd import fixed


def test_the_stand_in_has_the_singular_values_that_it_says() -> None:
    sigma = torch.linspace(3, 0.1, 48, dtype=torch.float64)
    weight = schedule.Spectral(sigma)
    dense = weight.apply(torch.eye(48), transposed=False)
    assert torch.allclose(torch.linalg.svdvals(dense.double()), sigma, atol=1e-5)
    assert torch.allclose(weight.apply(torch.eye(48), transposed=True), dense.mT, atol=1e-6)
    V = torch.linalg.svd(dense.double()).Vh[:5].mT
    assert abs(weight.deficit(V.float())) <= 1e-9


def test_every_spectrum_is_printed_and_right(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schedule", "--size", "320", "--ranks", "8"]) == 0
    text = capsys.readouterr().out
    assert "rank 8: 128 columns, filters of degree (3, 4)" in text
    assert {"mix", "power", "flat", "query", "value", "output"} <= set(text.split())


def test_a_wrong_certificate_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fixed, "SCHEDULES", {8: fixed.Schedule(32, (2,))})
    monkeypatch.setattr(fixed.Steps, "_deficit", lambda self, values, *_: torch.zeros(len(values)).double())
    assert main(["schedule", "--size", "320", "--ranks", "8"]) == 1


@pytest.mark.parametrize("rank", ["0", "257"])
def test_ranks_without_a_schedule_are_refused(rank: str, capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["schedule", "--ranks", rank], ["ledger", "--ranks", rank]):
        with pytest.raises(SystemExit):
            main(command)
        assert f"rank {rank}" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "seconds"), [(16, 0.15), (128, 0.25)])
def test_what_the_ledger_predicts(rank: int, seconds: float) -> None:
    model = MODELS["llama-2-7b"]
    lines = run.ledger(run.initialize, model, rank, 128, H100)
    assert run.prediction(lines, model, H100)["resident"] <= seconds
    # three batches, one for each shape
    assert sum(line.waits for line in lines.values()) <= 3 * 3
