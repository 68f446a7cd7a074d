"""Sequences of operations in which a model has computed something else once. The walk compares after each step."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import peft
import pytest
import torch
from peft.utils import hotswap

from pissa_kernels.peft.weights.record import records

from ...support.lora_errors import quiet
from ...support.lora_files import ModelWalk
from ...support.lora_reference import Network
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


def test_pissa_beside_an_active_dora_adapter_is_refused(refusing: ModelWalk) -> None:
    refusing.start("default", {**PLAIN, "use_dora": True})
    refusing.train("default", 1)
    refusing.add("second", PISSA, False)
    assert refusing.names == ["default"]


@pytest.mark.parametrize("settings", [PISSA, PLAIN], ids=["pissa", "plain"])
def test_dora_beside_a_merged_adapter_is_refused(refusing: ModelWalk, settings: dict[str, object]) -> None:
    """PEFT takes the magnitudes before it unmerges."""
    refusing.start("default", settings)
    refusing.train("default", 0)
    refusing.merge(None)
    refusing.add("second", DORA, False)


@pytest.mark.parametrize("names", [["default", "second"], ["second", "default"]])
@pytest.mark.parametrize("merged", [False, True])
def test_plain_dora_together_with_pissa_is_refused(names: list[str], merged: bool) -> None:
    """DoRA needs the norm of W + ΔW, and what is stored is the residual of the other adapter, also where C is zero."""
    walk = ModelWalk()
    with quiet():
        walk.start("default", {**PLAIN, "use_dora": True})
        walk.add("third", PLAIN, False)
        walk.use(["third"])
        walk.add("second", PISSA, False)
        walk.use(["second"])
        assert not walk.refusals
        (walk.merge if merged else walk.use)(names)
    walk.close()
    assert [message.startswith("PEFT") for _, message in walk.refusals] == [False]


@pytest.mark.parametrize("names", [["default"], ["third", "default"], ["default", "third"]])
def test_plain_dora_is_merged_into_the_original_weight(walk: ModelWalk, names: list[str]) -> None:
    walk.start("default", {**PLAIN, "use_dora": True})
    walk.train("default", 1)
    walk.add("third", PLAIN, False)
    walk.train("third", 2)
    walk.use(["third"])
    walk.add("second", PISSA, False)
    walk.merge(names)
    walk.unmerge()
    walk.step()


@pytest.mark.parametrize("names", [["default", "second"], ["second", "default"]])
def test_pissa_dora_beside_a_plain_adapter(walk: ModelWalk, names: list[str]) -> None:
    walk.start("default", DORA)
    walk.train("default", 1)
    walk.add("second", PLAIN, False)
    walk.train("second", 2)
    walk.use(names)
    walk.merge(names)
    walk.unmerge()
    for name in names:
        walk.merge([name])
    walk.unmerge()
    walk.step()


@pytest.mark.parametrize("start", [PISSA, DORA], ids=["LoRA", "DoRA"])
def test_a_scaling_that_changes_between_two_merges(walk: ModelWalk, start: dict[str, object]) -> None:
    walk.start("default", start)
    walk.train("default", 1)
    walk.add("second", PLAIN, False)
    walk.train("second", 2)
    walk.merge(["second"])
    walk.rescale("second", 0.5)
    walk.merge(["default"])
    walk.unmerge()
    walk.use(["default", "second"])


def test_a_rescaled_dora_adapter_is_refused(refusing: ModelWalk) -> None:
    refusing.start("default", DORA)
    refusing.rescale("default", 0.5)
    assert "its scaling is 1 now" in refusing.refusals[0][1]


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


def test_the_recipe_with_two_residuals_is_refused(walk: ModelWalk) -> None:
    walk.start("default", PISSA)
    walk.add("second", OTHER, False)
    for config in walk.model.peft_config.values():
        config.init_lora_weights = True
    before = walk.snapshot()
    with pytest.raises(ValueError, match=r"layer 'first', .*: the adapters 'default' and 'second' have"):
        walk.model.unload()
    assert not walk.changes(before)


@pytest.mark.parametrize("settings", [PISSA, PLAIN], ids=["pissa", "plain"])
@pytest.mark.parametrize("hooked", [False, True])
def test_a_failure_in_a_layer_of_a_second_adapter(settings: dict[str, object], hooked: bool) -> None:
    """The layer "first" is decomposed before the values of "last" are refused."""
    walk = ModelWalk()
    walk.start("default", {**settings, "target_modules": ("middle",)})
    last = walk.network.last.weight
    last.data[0, 0] = torch.nan
    before = walk.snapshot()
    layers = dict(walk.network.named_children())
    with quiet(), walk.hooked(hooked), pytest.raises(ValueError, match=r"layer 'last', .*: the weight holds NaN"):
        walk.model.add_adapter("second", walk.config(OTHER))
    now = walk.snapshot()
    walk.close()
    assert dict(walk.network.named_children()) == layers
    assert before.keys() == now.keys()
    for key, value in before.items():
        equal = isinstance(value, torch.Tensor) and torch.equal(value.nan_to_num(9.0), now[key].nan_to_num(9.0))
        assert equal or (not isinstance(value, torch.Tensor) and value == now[key]), key


def test_pissa_values_without_initial_factors_are_not_swapped_into_a_plain_adapter(walk: ModelWalk) -> None:
    walk.start("default", PISSA)
    walk.save("default")
    walk.add("second", PLAIN, False)
    folder = walk.saved.pop().folder
    (folder / "pissa_initial.safetensors").unlink()
    before = walk.snapshot()
    with pytest.raises(ValueError, match=r"layer 'first', .*: the values to swap in come without initial factors"):
        hotswap.hotswap_adapter(walk.model, str(folder), "second", torch_device="cpu")
    assert not walk.changes(before)


def test_a_hotswap_after_an_interrupted_one(walk: ModelWalk) -> None:
    """Values from elsewhere are not taken for those that PEFT has read last."""
    walk.start("default", PISSA)
    walk.train("default", 1)
    walk.save("default")
    walk.add("second", PLAIN, False)
    walk.train("second", 2)
    hotswap.load_peft_weights(str(walk.saved[0].folder), device="cpu")
    values = {key: value for key, value in walk.model.state_dict().items() if ".second." in key}
    hotswap.hotswap_adapter_from_state_dict(walk.model, values, "second", walk.model.peft_config["second"])
    walk.check("hotswap_adapter_from_state_dict")


def test_a_model_that_no_patch_has_made_is_swapped_by_peft(walk: ModelWalk) -> None:
    walk.start("default", PISSA)
    walk.train("default", 1)
    walk.save("default")
    stock = peft.get_peft_model(Network().eval(), walk.config(PLAIN))
    hotswap.hotswap_adapter(stock, str(walk.saved[0].folder), "default", torch_device="cpu")
    for name, layer in walk.lora_layers(stock).items():
        assert torch.equal(layer.lora_A["default"].weight, walk.lora_layers()[name].lora_A["default"].weight)
        assert not records(layer)


@pytest.mark.slow
def test_a_hotswap_in_a_process_that_has_only_unpickled_the_model(tmp_path: Path) -> None:
    """There no patch has been active, and the names were imported before the model was unpickled."""
    walk = ModelWalk()
    with quiet():
        walk.start("default", PISSA)
        walk.train("default", 1)
        walk.save("default")
        walk.add("second", PLAIN, False)
        walk.use(["second"])
        expected = [walk.forward()["first"][1]]
        walk.use(["default"])
        expected.append(walk.forward()["first"][1])
        walk.use(["second"])
        torch.save((walk.model, walk.x, str(walk.saved[0].folder)), tmp_path / "model.pt")
        torch.save(expected, tmp_path / "expected.pt")
        code = (
            "import sys, torch\n"
            "from peft.utils.hotswap import hotswap_adapter\n"
            "model, x, folder = torch.load(sys.argv[1] + '/model.pt', weights_only=False)\n"
            "plain, pissa = torch.load(sys.argv[1] + '/expected.pt')\n"
            "layer = model.base_model.model.first\n"
            "assert torch.allclose(layer(x), plain, atol=1e-5)\n"
            "hotswap_adapter(model, folder, 'second', torch_device='cpu')\n"
            "assert not torch.allclose(layer(x), plain, atol=1e-2)\n"
            "assert torch.allclose(layer(x), pissa, atol=1e-5)\n"
        )
        root = Path(__file__).parents[3]
        subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, cwd=root)
    walk.close()


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
