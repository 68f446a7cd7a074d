"""The search for launch parameters, on sizes that take no time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bench.tools import search
from pissa_kernels import ops
from pissa_kernels.ops.triton import launch


def test_launch_parameters_are_those_of_the_nearest_device_and_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    default = launch.read(launch.DEFAULT)
    (tmp_path / "default.json").write_text(search.written(default))
    assert json.loads((tmp_path / "default.json").read_text()) == default
    tuned = [{"features": {"bytes": 2, "rank": 16}, "parameters": {"BLOCK_ROWS": 7}}]
    (tmp_path / "nvidia_h100_80gb_hbm3.json").write_text(search.written({"subtract_lowrank_": tuned}))
    monkeypatch.setattr(launch, "FOLDER", tmp_path)
    launch.table.cache_clear()
    try:
        relative = launch.table("NVIDIA H100 PCIe")
        assert relative["subtract_lowrank_"] == tuned
        assert relative["product"] == default["product"]
        assert launch.table("NVIDIA A100-SXM4-80GB") == default
        assert launch.table(None) == default
    finally:
        launch.table.cache_clear()
    cpu = torch.device("cpu")

    def tile(size: int, columns: int, pieces: int) -> int:
        found = launch.parameters("product", cpu, bytes=size, columns=columns, pieces=pieces)
        return found["BLOCK_COLS"] + found["BLOCK_MORE"]

    assert [tile(2, columns, 1) for columns in (17, 64, 100, 160, 192, 256, 500)] == [16, 64, 128, 160, 192, 256, 256]
    for pieces in (2, 3):  # two accumulators of more than 64 columns do not fit in registers
        assert [tile(2, columns, pieces) for columns in (17, 64, 100, 192, 320, 448, 4000)] == [16, *[64] * 6]
    assert [tile(4, columns, pieces) for columns in (8, 192, 500) for pieces in (1, 3)] == [16, 16, 64, 64, 64, 64]


@pytest.mark.parametrize("verb", sorted(search.GRIDS))
def test_the_search_tries_a_dozen_and_the_default_first(verb: str) -> None:
    for entry in launch.read(launch.DEFAULT)[verb]:
        tried = list(search.candidates(verb, entry["parameters"]))
        assert tried[0] == entry["parameters"]
        assert 2 <= len(tried) <= 13
        assert len({json.dumps(candidate, sort_keys=True) for candidate in tried}) == len(tried)


@pytest.mark.parametrize("verb", ["subtract_lowrank_", "sum_of_squares"])
def test_the_search_calls_each_entry(verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if ops.unsupported_reasons("matmul", torch.ones(2, 2))["triton"]:
        pytest.skip("needs Triton's interpreter")
    monkeypatch.setattr(search, "SHAPE", (64, 48))
    for entry in launch.read(launch.DEFAULT)[verb]:
        weight, run, exact = search.call(verb, entry["features"], "cpu")
        for backend in ("torch", "triton"):
            monkeypatch.setenv(ops.dispatch.VARIABLE, backend)
            assert (run(weight.clone()) - exact).norm() <= 2.0**-8 * exact.norm(), (entry, backend)


def test_the_search_keeps_what_is_correct(monkeypatch: pytest.MonkeyPatch) -> None:
    if ops.unsupported_reasons("matmul", torch.ones(2, 2))["triton"]:
        pytest.skip("needs Triton's interpreter")
    monkeypatch.setattr(search, "SHAPE", (64, 48))
    monkeypatch.setattr(search, "REPEATS", 1)
    monkeypatch.setitem(search.GRIDS, "product", {"BLOCK_INNER": (32,)})
    entry = launch.read(launch.DEFAULT)["product"][0]
    winner = search.best("product", entry, "cpu")
    assert winner in list(search.candidates("product", entry["parameters"]))
    with monkeypatch.context() as patch:
        triton = pytest.importorskip("pissa_kernels.ops.triton")
        patch.setattr(triton, "matmul", lambda W, X, pieces=3: W.new_full((len(W), X.shape[1]), float("nan")))
        with pytest.raises(RuntimeError, match="no candidate is correct"):
            search.best("product", entry, "cpu")
    monkeypatch.setattr(search, "LIMIT", 0.0)
    with pytest.raises(RuntimeError, match="no candidate is correct"):
        search.best("product", entry, "cpu")
