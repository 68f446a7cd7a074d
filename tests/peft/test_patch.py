"""The patch: what is replaced, for which threads, and what is restored."""

from __future__ import annotations

import inspect
import threading
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora.layer import LoraLayer, MultiheadAttention, ParamWrapper
from peft.tuners.lora.model import LoraModel
from peft.tuners.tuners_utils import BaseTuner
from torch import nn
from transformers.integrations.peft import PeftAdapterMixin

import pissa_kernels as pk

from ..support.reference import realistic

ORIGINAL = LoraLayer.__dict__["pissa_init"]
ORIGINAL_CREATE = LoraModel.__dict__["_create_and_replace"]
HOOKED: list[tuple[Any, str]] = [
    (LoraLayer, "pissa_init"),
    (LoraLayer, "reset_lora_parameters"),
    *((kind, "update_layer") for kind in (MultiheadAttention, ParamWrapper)),
    (LoraModel, "_create_and_replace"),
    (BaseTuner, "inject_adapter"),
    *((peft.PeftModel, name) for name in ("from_pretrained", "load_adapter", "__init__", "add_adapter")),
    (PeftAdapterMixin, "load_adapter"),
]
ORIGINALS = [vars(owner)[name] for owner, name in HOOKED]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(24, 40)
        self.second = nn.Linear(40, 24)
        for index, layer in enumerate((self.first, self.second)):
            layer.weight.data = realistic(*layer.weight.shape, seed=index).float()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x))


def inject(net: nn.Module | None = None, **changes: Any) -> Any:
    settings = {"r": 4, "init_lora_weights": "pissa", "target_modules": ["first", "second"]} | changes
    return peft.get_peft_model(net or Net(), peft.LoraConfig(**settings))


@pytest.fixture(autouse=True)
def _restored():  # type: ignore[no-untyped-def]
    yield
    assert [vars(owner)[name] for owner, name in HOOKED] == ORIGINALS


def test_peft_still_calls_the_replaced_methods() -> None:
    """A version of PEFT that calls other methods fails here, and not in a user's model."""
    assert list(inspect.signature(ORIGINAL).parameters) == ["self", "adapter_name", "init_lora_weights"]
    names = list(inspect.signature(ORIGINAL_CREATE).parameters)
    assert names[:7] == ["self", "lora_config", "adapter_name", "target", "target_name", "parent", "current_key"]
    from peft.tuners.lora import layer, tp_layer

    call = "self.pissa_init(adapter_name, init_lora_weights)"
    assert inspect.getsource(layer).count(call) == 2
    assert inspect.getsource(tp_layer).count(call) == 1
    for module in (layer, tp_layer):
        assert "with gather_params_ctx(self.get_base_layer().weight):" in inspect.getsource(module)
    for subclass in LoraLayer.__subclasses__():
        for name in ("pissa_init", "reset_lora_parameters"):
            # AdaLoRA has an initializer of its own, and no PiSSA
            assert name not in vars(subclass) or subclass.__name__ == "AdaLoraLayer", f"{subclass} bypasses the hook"


def test_nothing_else_is_replaced() -> None:
    with pk.patch_peft():
        replaced = [(owner, name) for owner in {o for o, _ in HOOKED} for name in vars(owner) if is_ours(owner, name)]
    assert sorted(replaced, key=str) == sorted(HOOKED, key=str)


def is_ours(owner: Any, name: str) -> bool:
    found = vars(owner)[name]
    return hasattr(getattr(found, "__func__", found), "_pissa_kernels_session")


def test_the_report_names_the_layers() -> None:
    seen: list[str] = []
    with pk.patch_peft(on_layer=lambda layer: seen.append(layer.name)) as report:
        inject()
    assert [layer.name for layer in report.layers] == sorted(seen) == ["first", "second"]
    layer = report.layers[0]
    assert (layer.shape, layer.rank) == ((40, 24), 4)
    assert layer.certificate.converged
    assert 0 < layer.certificate.energy < 1
    assert layer.seconds > 0
    assert layer.singular_values.shape == (4,)


def test_an_error_names_the_layer_and_ends_the_patch() -> None:
    net = Net()
    net.second.weight.data[0, 0] = torch.nan
    with (
        pytest.raises(ValueError, match=r"^layer 'second', weight \(24, 40\): the weight holds NaN"),
        pk.patch_peft() as report,
    ):
        inject(net)
    assert [layer.name for layer in report.layers] == ["first"]


def test_patch_and_unpatch_as_functions() -> None:
    report = pk.patch_peft()
    try:
        assert LoraLayer.__dict__["pissa_init"] is not ORIGINAL
        inject()
    finally:
        pk.unpatch_peft()
    assert len(report.layers) == 2
    inject()
    assert len(report.layers) == 2
    pk.unpatch_peft()  # no patch is active: nothing changes


def test_the_innermost_patch_does_the_work() -> None:
    with pk.patch_peft(seed=1) as outer:
        inject()
        with pk.patch_peft(seed=2) as inner:
            inject()
        inject()
    assert (len(outer.layers), len(inner.layers)) == (4, 2)


def test_patches_may_end_out_of_order() -> None:
    first = pk.patch_peft()
    second = pk.patch_peft()
    first.close()
    inject()
    assert (len(first.layers), len(second.layers)) == (0, 2)
    second.close()
    second.close()


def test_an_earlier_patch_of_other_code_is_restored() -> None:
    calls: list[str] = []

    def theirs(self: Any, adapter_name: str, init_lora_weights: str) -> None:
        calls.append(adapter_name)

    LoraLayer.pissa_init = theirs
    try:
        with pk.patch_peft():
            inject()
        assert LoraLayer.__dict__["pissa_init"] is theirs
        assert calls == []
        inject()
        assert calls == ["default", "default"]
    finally:
        LoraLayer.pissa_init = ORIGINAL


def test_a_later_patch_of_other_code_stays_and_passes_through() -> None:
    calls: list[str] = []
    with pk.patch_peft() as report:
        below = LoraLayer.__dict__["pissa_init"]

        def theirs(self: Any, adapter_name: str, init_lora_weights: str) -> None:
            calls.append(adapter_name)
            below(self, adapter_name, init_lora_weights)

        LoraLayer.pissa_init = theirs
        inject()
    assert len(report.layers) == 2
    try:
        assert LoraLayer.__dict__["pissa_init"] is theirs
        inject()  # theirs → our closed wrapper → PEFT's
        assert len(calls) == 4
        assert len(report.layers) == 2
    finally:
        LoraLayer.pissa_init = ORIGINAL


def test_a_with_block_applies_to_its_own_thread() -> None:
    failures: list[BaseException] = []

    def elsewhere() -> None:
        try:
            inject()
        except BaseException as error:
            failures.append(error)

    with pk.patch_peft() as report:
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        assert report.layers == []
    everywhere = pk.patch_peft()
    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    pk.unpatch_peft()
    assert failures == []
    assert len(everywhere.layers) == 2


def test_threads_patch_at_the_same_time() -> None:
    counts: list[int] = []

    def work() -> None:
        for _ in range(5):
            with pk.patch_peft() as report:
                inject()
            counts.append(len(report.layers))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counts == [2] * 20


def test_a_second_adapter_and_other_inits() -> None:
    with pk.patch_peft() as report:
        model = inject(init_lora_weights=True)
        assert report.layers == []
        model.add_adapter("other", peft.LoraConfig(r=2, init_lora_weights="pissa", target_modules=["first"]))
    assert [layer.name for layer in report.layers] == ["first"]
    assert report.layers[0].rank == 2


def test_tied_weights_are_refused() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(50, 24)
            self.first = nn.Linear(24, 24)
            self.head = nn.Linear(24, 50, bias=False)
            self.head.weight = self.embed.weight

    net = Tied()
    before = net.embed.weight.detach().clone()
    with (
        pytest.raises(ValueError, match=r"^layer 'head', weight \(50, 24\): .* is tied to embed\.weight.*Untie"),
        pk.patch_peft(),
    ):
        inject(net, target_modules=["head"])
    assert torch.equal(before, net.embed.weight)
    net = Tied()
    net.head.weight = nn.Parameter(net.embed.weight.detach()[:])  # two parameters, one storage
    with pytest.raises(ValueError, match=r"tied to embed\.weight"), pk.patch_peft():
        inject(net, target_modules=["head"])
    net = Tied()
    net.head.weight = nn.Parameter(net.embed.weight.detach().clone())
    with pk.patch_peft() as report:
        inject(net, target_modules=["first", "head"])
    assert len(report.layers) == 2


def test_slices_of_one_storage_are_not_tied() -> None:
    net = Net()
    flat = torch.cat([net.first.weight.detach().flatten(), net.second.weight.detach().flatten()])
    net.first.weight.data = flat[:960].view(40, 24)
    net.second.weight.data = flat[960:].view(24, 40)
    with pk.patch_peft() as report:
        inject(net)
    assert len(report.layers) == 2


def test_every_kind_of_layer_is_initialized_here() -> None:
    """Also those for which PEFT does not call the method that was there."""
    taken: list[str] = []

    def theirs(self: Any, adapter_name: str, init_lora_weights: str) -> None:
        taken.append(type(self).__name__)

    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.Linear(8, 8)
            self.experts.weight = nn.Parameter(torch.randn(3, 8, 8))

    LoraLayer.pissa_init = theirs
    try:
        with pk.patch_peft() as report:
            net = Experts()
            inject(net, target_modules=[], target_parameters=["experts.weight"])
            inject(nn.Sequential(nn.MultiheadAttention(8, 2), nn.Embedding(9, 8)), target_modules=["0", "1"])
        names = ["experts.weight", "0", "0.base_layer.out_proj", "1"]
        assert [layer.name for layer in report.layers] == names
        assert taken == []
    finally:
        LoraLayer.pissa_init = ORIGINAL


def test_low_cpu_mem_usage_leaves_the_model_unchanged() -> None:
    net = Net()
    before = net.first.weight.detach().clone()
    settings = peft.LoraConfig(r=4, init_lora_weights="pissa", target_modules=["first", "second"])
    with pk.patch_peft() as report, pytest.warns(UserWarning, match="low_cpu_mem_usage"):
        model = peft.get_peft_model(net, settings, low_cpu_mem_usage=True)
    assert report.layers == []
    assert torch.equal(before, model.base_model.model.first.base_layer.weight)


def test_the_global_random_state_is_unchanged() -> None:
    """PEFT draws A and B itself before the initializer runs; the initializer draws nothing more."""
    torch.manual_seed(0)
    inject(init_lora_weights=False)
    expected = torch.get_rng_state()
    torch.manual_seed(0)
    with pk.patch_peft():
        inject(init_lora_weights=False)
    assert torch.equal(expected, torch.get_rng_state())
    layer = inject(init_lora_weights=False).base_model.model.first
    state = torch.get_rng_state()
    pk.pissa_init(layer, "default", "pissa_niter_4")
    assert torch.equal(state, torch.get_rng_state())
