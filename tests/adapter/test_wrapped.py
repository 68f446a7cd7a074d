"""The parameters of PEFT's wrappers, against live models of PEFT."""

from __future__ import annotations

from itertools import permutations
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora.layer import ParamWrapper
from torch import nn

from pissa_kernels.adapter.wrapped import Known, Parameter, Stored, name_inside, parameters_of, wrapper_paths

SHAPES = {"gate_up_proj": (4, 14, 6), "down_proj": (4, 6, 7), "w1": (4, 9, 6), "w3": (4, 9, 6), "flat": (8, 5)}
MODULE = "blocks.0.mlp.experts"


class Experts(nn.Module):
    """Parameters in an order, a module inside, and a parameter that is not adapted."""

    def __init__(self, names: tuple[str, ...]) -> None:
        super().__init__()
        self.left = nn.Parameter(torch.zeros(4, 3, 3))
        for name in names:
            self.register_parameter(name, nn.Parameter(torch.randn(SHAPES[name])))
        self.router = nn.Linear(6, 4)


def model_with(names: tuple[str, ...], **settings: Any) -> Any:
    block = nn.Module()
    block.mlp = nn.Module()
    block.mlp.experts = Experts(names)
    block.proj = nn.Linear(3, 3)
    model = nn.Module()
    model.blocks = nn.ModuleList([block])
    config = peft.LoraConfig(**({"r": 2, "target_modules": ["proj", "router"]} | settings))
    return peft.get_peft_model(model, config)


def stored(model: Any) -> dict[str, Stored]:
    """What the file of an adapter has, by PEFT's paths."""
    weights = peft.get_peft_model_state_dict(model)
    found = {}
    for key, A in weights.items():
        if key.endswith(".lora_A.weight"):
            B = weights[key.replace("lora_A", "lora_B")]
            path = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            found[path] = Stored(len(A), (len(B), A.shape[1]))
    return found


def wrappers(model: Any) -> dict[str, Any]:
    """PEFT's wrappers, by their names in the model."""
    return {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if isinstance(module, ParamWrapper)
    }


def settings_of(model: Any) -> dict[str, Any]:
    config = model.peft_config["default"].to_dict()
    return {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}


@pytest.mark.parametrize(
    "names",
    [("gate_up_proj",), *permutations(("gate_up_proj", "down_proj")), *permutations(("gate_up_proj", "flat", "w1"))],
)
@pytest.mark.parametrize("target", ["{}", "experts.{}", "blocks.0.mlp.experts.{}"])
def test_paths_are_those_of_peft(names: tuple[str, ...], target: str) -> None:
    model = model_with(names, target_parameters=[target.format(name) for name in sorted(names, reverse=True)])
    found = {f"{MODULE}.{wrapper.parameter_name}": path for path, wrapper in wrappers(model).items()}
    assert wrapper_paths(MODULE, names) == found
    known = Known(names={path: name for name, path in found.items()})
    read = parameters_of(stored(model), settings_of(model), known)
    assert {path: parameter.name for path, parameter in read.items()} == {path: name for name, path in found.items()}
    assert all(parameter.decided for parameter in read.values())
    assert {path: parameter.experts for path, parameter in read.items()} == {
        path: wrapper.num_experts for path, wrapper in wrappers(model).items()
    }


RANKS = {"gate_up_proj": 3, "down_proj": 5, "w1": 7}


@pytest.mark.parametrize(
    "names", [("gate_up_proj",), *permutations(("gate_up_proj", "down_proj")), *permutations(RANKS)]
)
def test_ranks_by_pattern_tell_parameters_apart(names: tuple[str, ...]) -> None:
    pattern = {"gate_up_proj": 3, "experts.down_proj": 5, f"{MODULE}.w1": 7}
    model = model_with(names, target_parameters=[f"experts.{name}" for name in names], rank_pattern=pattern)
    for path, wrapper in wrappers(model).items():
        assert wrapper.r["default"] == RANKS[wrapper.parameter_name]
        read = parameters_of(stored(model), settings_of(model))
        assert read[path] == Parameter(f"{MODULE}.{wrapper.parameter_name}", decided=True, experts=4)


@pytest.mark.parametrize("names", permutations(("gate_up_proj", "down_proj")))
def test_shapes_of_a_report_tell_parameters_apart(names: tuple[str, ...]) -> None:
    model = model_with(names, target_parameters=[f"experts.{name}" for name in names], alpha_pattern={"down_proj": 7})
    matrices = {f"{MODULE}.{name}": {SHAPES[name]} for name in SHAPES}
    read = parameters_of(stored(model), settings_of(model), Known(matrices=matrices))
    for path, wrapper in wrappers(model).items():
        assert read[path] == Parameter(f"{MODULE}.{wrapper.parameter_name}", decided=True, experts=4)


@pytest.mark.parametrize("names", permutations(("w1", "w3")))
def test_the_order_tells_parameters_of_one_shape_apart(names: tuple[str, ...]) -> None:
    model = model_with(names, target_parameters=[f"experts.{name}" for name in names])
    undecided = parameters_of(stored(model), settings_of(model))
    assert {parameter.decided for parameter in undecided.values()} == {False}
    assert {parameter.name for parameter in undecided.values()} == {f"{MODULE}.{name}" for name in names}
    order = [f"{MODULE}.{name}" for name in reversed(names)]
    read = parameters_of(stored(model), settings_of(model), Known(order=order))
    for path, wrapper in wrappers(model).items():
        assert read[path] == Parameter(f"{MODULE}.{wrapper.parameter_name}", decided=True, experts=4)
    with pytest.raises(ValueError, match=rf"layer '{MODULE}': there are factors of 2 parameters, which are not those"):
        parameters_of(stored(model), settings_of(model), Known(order=["others"]))


def test_different_settings_of_parameters_that_may_be_either_are_refused() -> None:
    model = model_with(
        ("w1", "w3"), target_parameters=["experts.w1", "experts.w3"], alpha_pattern={"w1": 3}, target_modules=["proj"]
    )
    with pytest.raises(ValueError, match=rf"layer '{MODULE}': .* which of {MODULE}\.w1, {MODULE}\.w3 its factors are"):
        parameters_of(stored(model), settings_of(model))


def test_modules_inside_wrappers_keep_their_names() -> None:
    model = model_with(("w1", "w3"), target_parameters=["experts.w1", "experts.w3"])
    found = stored(model)
    read = parameters_of(found, settings_of(model))
    names = {name_inside(path, read) for path in found.keys() - read.keys()}
    assert names == {f"{MODULE}.router", "blocks.0.proj"}


def test_layers_of_target_modules_are_no_wrappers() -> None:
    """A parameter's name alone may end any name."""
    model = model_with(("w1",), target_parameters=["w1"])
    assert parameters_of(stored(model), settings_of(model)).keys() == {MODULE}
    plain = {"a.w": Stored(2, (3, 3))}
    assert not parameters_of(plain, {"r": 2, "target_modules": "all-linear", "target_parameters": ["x"]})
    assert not parameters_of(plain, {"r": 2, "target_modules": r".*\.w", "target_parameters": ["x"]})
    assert not parameters_of(plain, {"r": 2, "target_modules": ["w"]})


@pytest.mark.parametrize(
    ("found", "words"),
    [
        ({"e": Stored(7, (3, 3))}, r"layer 'e': lora_A has 7 rows, .* factors of e\.x or e\.y, "),
        ({"e.base_layer": Stored(8, (3, 3))}, r"layer 'e': its wrappers e\.base_layer are not nested"),
        (
            {"e" + ".base_layer" * depth: Stored(8, (3, 3)) for depth in range(3)},
            r"layer 'e': there are factors of 3 parameters, .* names \(e\.x, e\.y\)",
        ),
    ],
)
def test_refusals(found: dict[str, Stored], words: str) -> None:
    config = {"r": 2, "lora_alpha": 2, "target_parameters": ["e.x", "e.y"]}
    with pytest.raises(ValueError, match=words):
        parameters_of(found, config)


def test_many_parameters_that_nothing_tells_apart() -> None:
    names = [f"p{index}" for index in range(9)]
    config = {"r": 2, "lora_alpha": 2, "target_parameters": [f"e.{name}" for name in names]}
    found = {path: Stored(8, (3, 3)) for path in wrapper_paths("e", names).values()}
    with pytest.raises(ValueError, match=r"layer 'e': .* which of 9 parameters its 9 pairs of factors are for"):
        parameters_of(found, config)
    known = Known(names={path: name for name, path in wrapper_paths("e", names).items()})
    read = parameters_of(found, config, known)
    assert {path: parameter.name for path, parameter in read.items()} == dict(known.names)
