"""The search for launch parameters, on sizes that take no time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bench.gpu import search
from bench.gpu.search import GRIDS, Search
from pissa_kernels import ops
from pissa_kernels.ops.triton import launch

SMALL = Search("cpu", size=64, batch=2)


def test_launch_parameters_are_those_of_the_architecture_and_the_nearest_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    default = launch.read(launch.DEFAULT)
    (tmp_path / "default.json").write_text(search.written(default))
    assert json.loads((tmp_path / "default.json").read_text()) == default
    tuned = [{"features": {"bytes": 2, "rank": 16}, "parameters": {"BLOCK_ROWS": 7}}]
    (tmp_path / "sm_90.json").write_text(search.written({"subtract_lowrank_": tuned}))
    (tmp_path / "gfx.json").write_text(search.written({"split": tuned}))
    monkeypatch.setattr(launch, "FOLDER", tmp_path)
    launch.table.cache_clear()
    try:
        for name, verb in (("sm_90", "subtract_lowrank_"), ("gfx942", "split")):
            assert launch.table(name) == default | {verb: tuned}
        assert launch.table("sm_80") == default
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


@pytest.mark.parametrize("verb", sorted(GRIDS))
def test_the_search_tries_the_default_first_and_each_candidate_once(verb: str) -> None:
    for entry in launch.read(launch.DEFAULT)[verb]:
        tried = list(search.candidates(verb, entry["features"], entry["parameters"]))
        assert tried[0] == entry["parameters"]
        assert 2 <= len(tried) <= 37
        assert len({json.dumps(candidate, sort_keys=True) for candidate in tried}) == len(tried)


# The interpreter takes minutes for the small dense problems of a whole batch.
@pytest.mark.parametrize("verb", [verb for verb in GRIDS if not verb.startswith(("eigh", "inverse"))])
def test_the_search_finds_parameters_for_an_entry_of_each_verb(verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if ops.unsupported_reasons("matmul", torch.ones(2, 2))["triton"]:
        pytest.skip("needs Triton's interpreter")
    monkeypatch.setattr(search, "REPEATS", 1)
    monkeypatch.setitem(GRIDS, verb, {name: values[:1] for name, values in GRIDS[verb].items()})
    entry = launch.read(launch.DEFAULT)[verb][0]
    winner = SMALL.best(verb, entry)
    assert winner in list(search.candidates(verb, entry["features"], entry["parameters"]))


def test_the_search_rejects_wrong_results(monkeypatch: pytest.MonkeyPatch) -> None:
    if ops.unsupported_reasons("matmul", torch.ones(2, 2))["triton"]:
        pytest.skip("needs Triton's interpreter")
    from pissa_kernels.ops.triton import batched

    entry = launch.read(launch.DEFAULT)["split"][0]
    monkeypatch.setattr(batched, "split", lambda values, pieces: values.new_zeros(pieces, *values.shape).bfloat16())
    with pytest.raises(RuntimeError, match="no candidate is correct"):
        SMALL.best("split", entry)


def test_entries_that_are_not_searched_keep_their_parameters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    best = {"BLOCK": 2048, "num_warps": 8, "num_stages": 1}
    monkeypatch.setattr(Search, "best", lambda self, verb, entry: best)
    path, default = tmp_path / "sm_90.json", launch.read(launch.DEFAULT)
    assert SMALL.run(path, r"^product .*: 256, 'pieces': 2|^split") == 2
    written = json.loads(path.read_text())
    assert list(written) == ["product", "split"]
    changed = [entry for entry, before in zip(written["product"], default["product"], strict=True) if entry != before]
    assert [entry["features"] for entry in changed] == [{"bytes": 2, "columns": 256, "pieces": 2}]
    assert written["split"][0]["parameters"] == best
