"""The table of docs/base-weight.md, cell by cell."""

from __future__ import annotations

import doctest
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from ...support.lora_errors import quiet
from ...support.lora_files import ModelWalk
from ...support.lora_reference import LAYERS
from ...support.lora_walk import SAMPLES

PAGE = Path(__file__).parents[3] / "docs" / "base-weight.md"
PISSA: dict[str, Any] = {"init_lora_weights": "pissa", "r": 2, "lora_alpha": 4, "target_modules": LAYERS}
OTHER = {**PISSA, "r": 3, "use_rslora": True}
PLAIN = {**PISSA, "init_lora_weights": True}


@pytest.fixture
def walk() -> Iterator[ModelWalk]:
    walk = ModelWalk()
    with quiet():
        yield walk
    walk.close()


def original(walk: ModelWalk) -> None:
    walk.start("default", PLAIN)
    walk.train("default", 1)


def residual(walk: ModelWalk) -> None:
    walk.start("default", PISSA)
    walk.train("default", 1)


def dora(walk: ModelWalk) -> None:
    walk.start("default", {**PISSA, "use_dora": True})
    walk.train("default", 1)


def merged(walk: ModelWalk) -> None:
    residual(walk)
    walk.save("default")
    walk.merge(None)


def unknown(walk: ModelWalk) -> None:
    residual(walk)
    walk.save("default")
    walk.tamper()


STATES = {"original": original, "residual": residual, "residual, DoRA": dora, "merged": merged, "unknown": unknown}


def saved(walk: ModelWalk) -> int:
    """A saved adapter of another training of the same start."""
    if not walk.saved:
        walk.save("default")
        walk.train("default", 2)
    return 0


OPERATIONS: dict[str, Callable[[ModelWalk], None]] = {
    "a forward pass": lambda walk: walk.check("a forward pass"),
    "a gradient step": lambda walk: walk.step(),
    "`add_adapter`: PiSSA with the same settings": lambda walk: walk.add("second", PISSA, False),
    "`add_adapter`: PiSSA with other settings": lambda walk: walk.add("second", OTHER, False),
    "`add_adapter`: a plain LoRA": lambda walk: walk.add("second", PLAIN, False),
    "`add_adapter`: DoRA": lambda walk: walk.add("second", {**PLAIN, "use_dora": True}, False),
    "`add_adapter`: OLoRA, CorDA, LoftQ, LoRA-GA": lambda walk: walk.add(
        "second", {**PISSA, "init_lora_weights": "olora"}, False
    ),
    "`add_weighted_adapter`: `cat`, `svd`": lambda walk: walk.weighted(["default"], [0.5], "second", "cat"),
    "`set_adapter`": lambda walk: walk.use(["default"]),
    "`disable_adapter()`": lambda walk: walk.without(),
    "`original_model()`": lambda walk: walk.original(),
    "`adapter_names=` in a batch": lambda walk: walk.mixed(["default", "__base__"]),
    "`set_scale`, `scale_layer`": lambda walk: walk.rescale("default", 0.5),
    "`merge_adapter`": lambda walk: walk.merge(None),
    "`unmerge_adapter`": lambda walk: walk.unmerge(),
    "`merge_and_unload`": lambda walk: walk.merge_and_unload(None),
    "`unload`": lambda walk: walk.unload(),
    "`save_pretrained`, reloaded on the base model": lambda walk: (walk.save("default"), walk.reload(-1)),
    "`load_adapter` into a new name": lambda walk: walk.load(saved(walk), "second", False),
    "`load_adapter` into the adapter": lambda walk: walk.load(saved(walk), "default", False),
    "`hotswap_adapter`": lambda walk: walk.hotswap(saved(walk), "default", False),
    "`save_pissa`": lambda walk: walk.save_residual("default"),
    "conversion to a plain LoRA": lambda walk: walk.convert("default"),
    "`copy.deepcopy`, `pickle`, `to(device)`": lambda walk: [walk.replicate(way) for way in ("copy", "pickle", "move")],
    "`to(dtype)`": lambda walk: walk.cast(torch.bfloat16),
    "`torch.compile`": lambda walk: walk.compiled(),
}


def table() -> dict[tuple[str, str], str]:
    """The cells of the page's table of states, by operation and state."""
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    lines = lines[next(index for index, line in enumerate(lines) if line.startswith("| operation | original |")) :]
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in itertools.takewhile(lambda line: line.startswith("|"), lines)
    ]
    states = rows[0][1:]
    return {(row[0], state): cell for row in rows[2:] for state, cell in zip(states, row[1:], strict=True)}


CELLS = table()


def test_the_table_has_every_operation() -> None:
    assert {operation for operation, _ in CELLS} == set(OPERATIONS)
    assert {state for _, state in CELLS} == set(STATES)


@pytest.mark.parametrize(("operation", "state"), [key for key, cell in CELLS.items() if cell != "left to PEFT"])
def test_a_cell_of_the_table(walk: ModelWalk, operation: str, state: str) -> None:
    """Anything but the reference's outputs, or a refusal that has changed nothing, fails in the walk itself."""
    STATES[state](walk)
    assert not walk.refusals
    OPERATIONS[operation](walk)
    cell, refusals = CELLS[operation, state], [message for _, message in walk.refusals]
    if cell.startswith("PEFT refuses"):
        assert refusals
        assert all(message.startswith("PEFT: ") for message in refusals)
    elif cell.startswith("refused"):
        assert refusals
        assert not any(message.startswith("PEFT: ") for message in refusals)
    else:
        assert cell.startswith(("right", "shared", "corrected"))
        assert not refusals


def flops(walk: ModelWalk) -> int:
    with FlopCounterMode(display=False) as counter:
        walk.forward()
    return counter.get_total_flops()


def test_what_a_forward_pass_costs(walk: ModelWalk) -> None:
    """Without a correction what PEFT's costs; with one, two products for each group of initial factors."""
    plain = ModelWalk()
    plain.start("default", PLAIN)
    walk.start("default", PISSA)
    plain.close()
    assert flops(walk) == flops(plain)
    walk.add("second", PISSA, False)
    walk.use(["second"])
    assert flops(walk) == flops(plain)
    with walk.model.disable_adapter(), plain.model.disable_adapter():
        rank_2 = flops(walk) - flops(plain)
    sizes = sum(sum(layer.weight.shape) for layer in walk.layers.values())
    assert rank_2 == 2 * SAMPLES * 2 * sizes
    walk.add("third", OTHER, False)
    walk.use(["third"])
    plain.add("third", {**PLAIN, "r": 3}, False)
    plain.use(["third"])
    assert flops(walk) - flops(plain) == 2 * SAMPLES * (2 + 3) * sizes


def test_the_examples_of_the_page() -> None:
    result = doctest.testfile(str(PAGE), module_relative=False)
    assert result.attempted > 10
    assert result.failed == 0
