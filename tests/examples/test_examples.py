"""The examples run, and print correct figures."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pissa_kernels.examples import docstrings, plain, trainer
from pissa_kernels.numerics import UNIT_ROUNDOFF

# Relative difference of outputs that rounding allows: 8 unit roundoffs times the square root of some 40 layers, whose
# errors add like a random walk. A wrong residual makes a difference of about 1e-1.
ALLOWED = 8 * UNIT_ROUNDOFF[torch.float32] * 40**0.5


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """On busy cores, two threads that wait for each other at every small layer take ten times as long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def recorded(module: Any, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A list that collects the results of a module's ``run``."""
    results, run = [], module.run

    def recording(*args: Any) -> Any:
        results.append(run(*args))
        return results[-1]

    monkeypatch.setattr(module, "run", recording)
    return results


@pytest.mark.slow
def test_plain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    results = recorded(plain, monkeypatch)
    assert plain.main(["--steps", "4", "--out", str(tmp_path)]) == 0
    (result,) = results
    assert result.loss_after < result.loss_before
    assert result.trained > 1e-2
    assert result.reloaded == 0
    exact = {name: getattr(result, name) for name in ("injected", "residual", "converted", "original", "merged")}
    assert all(0 <= moved <= ALLOWED for moved in exact.values()), exact
    printed = capsys.readouterr().out
    assert "37 layers, rank 8" in printed
    assert "all converged" in printed
    assert f"{result.converted:.1e} from the trained model" in printed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "lora", "residual"]


@pytest.mark.slow
def test_trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    results = recorded(trainer, monkeypatch)
    for name, smaller in (("TRAINING", 40), ("HELD_OUT", 12), ("BATCH", 8)):
        monkeypatch.setattr(trainer, name, smaller)
    picture = tmp_path / "losses.png"
    assert trainer.main(["--steps", "4", "--rank", "4", "--out", str(tmp_path / "out"), "--plot", str(picture)]) == 0
    (result,) = results
    for curve in (result.pissa, result.lora):
        assert list(curve.losses) == [1, 2, 3, 4]
        assert all(math.isfinite(loss) for loss in curve.losses.values())
        assert curve.after < curve.before
        assert curve.before == pytest.approx(result.base, rel=ALLOWED)
        assert 0 < curve.accuracy <= 1
    assert result.pissa.losses[1] == pytest.approx(result.lora.losses[1], rel=1e-4)  # as the Trainer rounds it
    assert {"adapter_model.safetensors", "pissa_initial.safetensors", "pissa_report.json"} <= set(result.files)
    assert result.residual_kept
    assert result.resumed == result.reloaded == 0
    assert 0 <= result.converted <= ALLOWED
    assert f"{result.pissa.accuracy:.1%}" in capsys.readouterr().out
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_docstrings_are_seeded_and_distinct() -> None:
    texts = docstrings.docstrings("numpy", 20)
    assert texts == docstrings.docstrings("numpy", 20)
    assert texts != docstrings.docstrings("numpy", 20, seed=1)
    assert len(set(texts)) == 20
    assert all("\n\n" in text for text in texts)
    with pytest.raises(ModuleNotFoundError, match="nowhere is not installed"):
        docstrings.docstrings("nowhere", 1)


@pytest.mark.parametrize("module", [plain, trainer])
def test_bad_arguments(module: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    for arguments, message in (
        (["--steps", "0"], "'0' is not a number above 0"),
        (["--out", str(tmp_path)], "exists and is not an empty folder"),
    ):
        with pytest.raises(SystemExit) as stopped:
            module.main(arguments)
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err
