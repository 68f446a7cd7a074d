"""Sequences of operations in which a model has computed something else once. The walk compares after each step."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from ..support.lora_errors import quiet
from ..support.lora_files import ModelWalk
from .test_base_weight import OTHER, PISSA, PLAIN

DORA = {**PISSA, "use_dora": True}


@pytest.fixture
def walk() -> Iterator[ModelWalk]:
    """A walk in which nothing is refused."""
    walk = ModelWalk()
    with quiet():
        yield walk
    walk.close()
    assert not walk.refusals


@pytest.fixture
def refusing() -> Iterator[ModelWalk]:
    """A walk that ends with a refusal of the package."""
    walk = ModelWalk()
    with quiet():
        yield walk
    walk.close()
    assert len(walk.refusals) == 1
    assert not walk.refusals[0][1].startswith("PEFT")


@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize("settings", [PISSA, OTHER, PLAIN], ids=["the same", "other", "plain"])
def test_a_second_adapter_and_both_together(walk: ModelWalk, settings: dict[str, object], hooked: bool) -> None:
    walk.start("default", PISSA)
    walk.train("default", 1)
    walk.add("second", settings, hooked)
    walk.train("second", 2)
    for names in (["second"], ["default", "second"], ["second", "default"], ["default"]):
        walk.use(names)
        walk.step()
    walk.mixed(["default", "second", "__base__"])


def test_a_second_adapter_after_a_merge(walk: ModelWalk) -> None:
    walk.start("default", PISSA)
    walk.train("default", 1)
    walk.merge(None)
    walk.unmerge()
    walk.add("second", PISSA, False)
    walk.merge(None)
    walk.add("third", OTHER, False)


def test_a_pissa_adapter_beside_a_plain_one_outside_of_the_hook(walk: ModelWalk) -> None:
    walk.start("default", PLAIN)
    walk.train("default", 1)
    walk.add("second", PISSA, False)


def test_only_the_layers_of_a_second_adapter(walk: ModelWalk) -> None:
    walk.start("default", {**PISSA, "target_modules": ("first", "middle")})
    walk.train("default", 1)
    walk.add("second", {**OTHER, "target_modules": ("middle", "last")}, False)
    walk.use(["second"])
    walk.merge(["default"])
    walk.unmerge()


def test_disabled_layers(walk: ModelWalk) -> None:
    walk.start("default", PISSA)
    walk.enable(False)
    walk.train("default", 1)
    walk.add("second", OTHER, False)
    walk.enable(True)


def test_a_weighted_adapter_after_its_source_is_gone(walk: ModelWalk) -> None:
    walk.start("default", PISSA)
    walk.train("default", 1)
    walk.weighted(["default"], [0.5], "second", "cat")
    walk.delete("default")
    walk.convert("second")


@pytest.mark.parametrize("kind", ["cat", "svd"])
@pytest.mark.parametrize("second", [PISSA, OTHER, PLAIN], ids=["the same", "other", "plain"])
def test_weighted_adapters(walk: ModelWalk, second: dict[str, object], kind: str) -> None:
    walk.start("default", {**PISSA, "use_rslora": True})
    walk.train("default", 1)
    walk.add("second", second, False)
    walk.train("second", 2)
    walk.weighted(["default", "second"], [0.5, 2.0], "third", kind)
    walk.use(["third"])
    walk.train("third", 3)
    walk.save("third")
    walk.reload(0)


def test_the_residual_of_a_second_adapter_is_saved(walk: ModelWalk) -> None:
    walk.start("default", PISSA)
    walk.add("second", {**PISSA, "rank_pattern": {"last": 1}}, False)
    walk.train("second", 1)
    walk.save_residual("second")
    walk.delete("default")
    walk.save_residual("second")
    walk.unload()


def test_the_initial_magnitudes_are_saved(walk: ModelWalk) -> None:
    walk.start("default", DORA)
    walk.train("default", 0)
    walk.save_residual("default")


def test_a_merge_of_one_of_two(walk: ModelWalk) -> None:
    walk.start("default", PISSA)
    walk.train("default", 1)
    walk.add("second", OTHER, False)
    walk.train("second", 2)
    walk.merge(["second"])
    walk.merge(["default"])
    walk.unmerge()
    walk.merge_and_unload(["second"])


@pytest.mark.parametrize("names", [["default", "second"], ["second", "default"]])
@pytest.mark.parametrize("merged", [False, True])
def test_plain_dora_together_with_pissa_is_refused(names: list[str], merged: bool) -> None:
    """DoRA needs the norm of W + ΔW, and what is stored is the residual of the other adapter, also where C is zero."""
    walk = ModelWalk()
    with quiet():
        walk.start("default", {**PLAIN, "use_dora": True})
        walk.add("second", PISSA, False)
        if "second" in walk.names:
            walk.use(["second"])
            (walk.merge if merged else walk.use)(names)
    walk.close()
    assert walk.refusals


def test_a_refused_adapter_leaves_the_layers_that_came_before(refusing: ModelWalk) -> None:
    refusing.start("default", {**PISSA, "target_modules": ("middle", "last")})
    refusing.add("second", {**DORA, "alpha_pattern": {"middle": 2}}, False)


@pytest.mark.parametrize("hooked", [False, True])
def test_values_of_another_kind_of_adapter(walk: ModelWalk, hooked: bool) -> None:
    walk.start("default", PISSA)
    walk.train("default", 1)
    walk.save("default")
    walk.add("second", PLAIN, False)
    walk.train("second", 2)
    walk.save("second")
    walk.use(["default", "second"])
    walk.load(1, "default", hooked)
    walk.load(0, "second", hooked)
    walk.hotswap(0, "default", hooked)
    walk.hotswap(1, "second", hooked)


def test_scalings_that_change_while_merged(walk: ModelWalk) -> None:
    walk.start("default", PISSA)
    walk.train("default", 1)
    walk.merge(None)
    walk.rescale("default", 0.5)
    walk.unmerge()


def test_the_residual_of_the_recipe_with_another_scaling(walk: ModelWalk) -> None:
    walk.start("default", PISSA)
    walk.rescale("default", 0.5)
    walk.unload_residual("default")


def test_the_recipe_with_an_adapter_that_is_not_the_subtracted_one(walk: ModelWalk) -> None:
    walk.start("default", PISSA)
    walk.add("second", OTHER, False)
    walk.delete("default")
    walk.unload_residual("second")


def test_bfloat16(walk: ModelWalk) -> None:
    walk.start("default", PISSA)
    walk.train("default", 1)
    walk.cast(torch.bfloat16)
    walk.merge(None)
    walk.unmerge()
    walk.add("second", PISSA, False)
    walk.add("third", OTHER, False)
    walk.use(["third"])
    walk.original()
    walk.unload()


def test_starts_after_each_other(walk: ModelWalk) -> None:
    walk.start("default", PISSA)
    walk.train("default", 1)
    walk.save("default")
    walk.unload()
    walk.load_start(0)
    walk.merge_and_unload(None)
    walk.start("default", OTHER)
