"""``PissaState`` of one process: the factors of every kind of layer, and what is refused.

That several processes save and load it is in ``sharded_later_cases``.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import pissa_kernels as pk
from pissa_kernels.adapter.layers import lora_layers
from pissa_kernels.peft.weights.record import records

from ...support import kinds, quantized


def build(
    targets: tuple[str, ...] = ("0", "1"),
    rank: int = 4,
    initial: Any = "pissa",
    device: str = "cpu",
    adapter: str = "default",
) -> Any:
    with torch.device(device):
        base = torch.nn.Sequential(torch.nn.Linear(24, 32, bias=False), torch.nn.Linear(32, 16, bias=False))
    config = peft.LoraConfig(r=rank, target_modules=list(targets), init_lora_weights=initial)
    with pk.patch_peft():
        return peft.get_peft_model(base, config, adapter_name=adapter)


def kept(model: Any) -> list[Any]:
    return [record for _, layer in lora_layers(model) for record in records(layer)]


@pytest.fixture
def saved() -> dict[str, Any]:
    return pk.PissaState(build()).state_dict()


def test_model_takes_the_factors_of_another(saved: dict[str, Any]) -> None:
    other = build(initial="pissa_niter_1")
    assert not torch.equal(kept(other)[0].lora_A, saved["0|default|lora_A"])
    pk.PissaState(other).load_state_dict(saved)
    for record, name in zip(kept(other), "01", strict=True):
        for field in ("lora_A", "lora_B", "before", "after"):
            assert torch.equal(getattr(record, field), saved[f"{name}|default|{field}"])


def test_model_whose_factors_are_not_known_takes_them_but_cannot_save_them(saved: dict[str, Any]) -> None:
    with pytest.warns(UserWarning, match="meta device"):
        empty = build(device="meta")
    with pytest.raises(ValueError, match=r"layer '0', weight \(32, 24\): this process does not know .*share_initial"):
        pk.PissaState(empty).state_dict()
    to_load = pk.PissaState(empty, loading=True)
    assert {key: value.dtype for key, value in to_load.state_dict().items() if key != "reports"} == {
        key: value.dtype for key, value in saved.items() if key != "reports"
    }
    to_load.load_state_dict(saved)
    again = pk.PissaState(empty).state_dict()
    assert again["reports"] == saved["reports"]
    assert all(torch.equal(value, again[key]) for key, value in saved.items() if key != "reports")


def test_name_of_an_adapter_with_the_separator_of_keys() -> None:
    assert_round_trip(build(adapter="a|b"), build(adapter="a|b"))


@pytest.mark.parametrize("name", kinds.KINDS)
def test_every_kind_of_layer(name: str) -> None:
    def adapted() -> Any:
        with pk.patch_peft():
            return peft.get_peft_model(kinds.build(name), kinds.lora_config(name))

    assert_round_trip(adapted(), adapted())


@pytest.mark.parametrize("scheme", ["nf4", "int8"])
def test_quantized_layers(scheme: str, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    source = quantized.saved(tmp_path / "model")

    def adapted() -> Any:
        with pk.patch_peft(original=source):
            return peft.get_peft_model(quantized.loaded(source, scheme), quantized.lora())

    assert_round_trip(adapted(), adapted())


def assert_round_trip(model: Any, other: Any) -> None:
    pk.PissaState(other).load_state_dict(pk.PissaState(model).state_dict())
    for record, expected in zip(kept(other), kept(model), strict=True):
        for field in ("lora_A", "lora_B", "before", "after"):
            assert torch.equal(getattr(record, field), getattr(expected, field))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            lambda: torch.nn.Sequential(torch.nn.Linear(4, 4)),
            r"Sequential has no layer with initial factors, .*patch_peft",
        ),
        (
            lambda: build(initial=True),
            r"PeftModel has no layer with initial factors, so there is nothing to save or load",
        ),
    ],
    ids=["no adapter", "a plain LoRA"],
)
def test_nothing_to_save(make: Callable[[], Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        pk.PissaState(make()).state_dict()


def test_deleted_adapter_cannot_be_saved() -> None:
    model = build()
    model.delete_adapter("default")
    with pytest.raises(ValueError, match=r"the residual of an adapter that was deleted"):
        pk.PissaState(model).state_dict()


@pytest.mark.parametrize(
    ("changes", "model", "words"),
    [
        ({"reports": None}, {}, r"has no initial factors: no key 'reports' beside \['0\|default\|after', "),
        (
            {"1|default|lora_B": None},
            {},
            r"layer '1': lora_B of the adapter 'default' in the checkpoint is missing, .* needs \(16, 4\)",
        ),
        (
            {},
            {"rank": 3},
            r"layer '0': lora_A of .* in the checkpoint is \(4, 24\), .* needs \(3, 24\)",
        ),
        ({}, {"targets": ("0",)}, r"initial factors of the adapter 'default' of layer '1', which the model does not"),
        ({"reports": "[]"}, {}, r"layer '0', weight \(32, 24\): the checkpoint has no initial factors of the adapter"),
        (
            {"0|default|before": torch.zeros(3)},
            {},
            r"layer '0': before of .* in the checkpoint is \(3,\)",
        ),
    ],
    ids=["nothing", "a missing factor", "another rank", "another layer", "no report", "a short fingerprint"],
)
def test_state_of_another_model_is_refused(
    changes: dict[str, Any], model: dict[str, Any], words: str, saved: dict[str, Any]
) -> None:
    state = {key: value for key, value in (saved | changes).items() if value is not None}
    other = build(**model)
    before = kept(other)
    with pytest.raises(ValueError, match=words):
        pk.PissaState(other).load_state_dict(state)
    assert kept(other) == before


def test_empty_state_is_refused() -> None:
    with pytest.raises(ValueError, match=r"has no initial factors: no key 'reports' beside \[\]"):
        pk.PissaState(build()).load_state_dict({})
