"""What several processes check of models that are sharded before the adapter is made; run by ``test_sharded.py``."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import peft
import pytest
import torch
import torch.distributed as dist
import transformers
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule

import pissa_kernels as pk
from pissa_kernels.adapter.layers import lora_layers
from pissa_kernels.adapter.layouts import layout_of
from pissa_kernels.ops import reference
from pissa_kernels.runtime.shards import is_sharded, part_of
from pissa_kernels.svd import fixed, sharded_steps

from ...support.adapted import config
from ...support.architectures import ARCHITECTURES
from ...support.models import build, output
from ...support.reference import EPS, energy_deficit
from ...support.sharded import (
    DTYPES,
    WIDTH,
    assert_as_one_process,
    assert_is_base,
    assert_later_use,
    layers_of,
    sharded,
    sharded_later,
    train,
    whole,
)
from ...support.together import folder, raises_everywhere, same_everywhere, together


@together(2, 3, 4)
def check_fully_shard_before_the_adapter() -> None:
    for name in ("llama", "gpt2"):
        for dtype in DTYPES:
            base = build(name, dtype, width=WIDTH)
            logits = output(base)
            with pk.patch_peft():
                alone = peft.get_peft_model(copy.deepcopy(base), config(name))
            with pk.patch_peft() as report:
                model = peft.get_peft_model(sharded(copy.deepcopy(base)), config(name))
            assert len(report.layers) == len(list(lora_layers(model)))
            assert all(is_sharded(layout_of(layer).weight) for _, layer in lora_layers(model))
            assert_as_one_process(model, alone, base)
            assert_is_base(model, logits)
            assert_later_use(model, base, logits, folder(f"{name}-{dtype}"))


@together(2)
def check_other_layers_under_fully_shard() -> None:
    """An embedding, and stacks of experts whose matrices the processes share."""
    base = ARCHITECTURES["mixtral"].build().float().eval()
    logits = output(base)
    settings = {
        "target_modules": ["embed_tokens", "q_proj"],
        "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    }
    asked = config("llama", **settings)
    with pk.patch_peft():
        alone = peft.get_peft_model(copy.deepcopy(base), copy.deepcopy(asked))
    with pk.patch_peft():
        model = peft.get_peft_model(sharded(copy.deepcopy(base)), copy.deepcopy(asked))
    assert_as_one_process(model, alone, base)
    assert_is_base(model, logits)
    with pk.original_model(model):
        assert_is_base(model, logits)


@together(2, 3)
def check_batches_of_the_schedule() -> None:
    """On CPU tensors: layers of equal shape go through the GPU's schedule together, in order, in every process."""
    base = build("llama", torch.bfloat16, width=WIDTH)
    logits = output(base)
    seen: list[int] = []
    solve = sharded_steps.solve

    def counted(shards: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(len(shards))
        return solve(shards, *args, **kwargs)

    originals = {
        name: layer.weight.detach().clone() for name, layer in base.named_modules() if hasattr(layer, "weight")
    }
    names: list[str] = []
    for budget in (None, 2 * fixed.workspace(3 * WIDTH, WIDTH, 4)):
        seen.clear()
        model = sharded(copy.deepcopy(base))
        with (
            mock.patch.object(fixed, "DEVICES", ("cpu",)),
            mock.patch.object(sharded_steps, "solve", counted),
            pk.patch_peft(memory_budget=budget, on_layer=lambda layer: names.append(layer.name)) as report,
        ):
            model = peft.get_peft_model(model, config("llama"))
        assert sum(seen) == 14
        # two or four layers of each of the four shapes; in the budget, two of the largest at a time
        assert seen == ([4, 4, 4, 2] if budget is None else [2, 2, 4, 2, 2, 2]), seen
        assert [layer.name for layer in report.layers] == [name for name, _ in lora_layers(model)]
        assert {layer.certificate.method for layer in report.layers} == {"fixed"}
        for name, (W, A, B) in layers_of(model).items():
            same_everywhere(W, A, B)
            assert energy_deficit(originals[name], A) <= 4e-6, name
        assert_is_base(model, logits)
        with pk.original_model(model):
            assert_is_base(model, logits)
    assert len(names) == 28

    def fails(layer: Any) -> None:
        if dist.get_rank() == 1:
            raise KeyError("of the caller, in one process")

    model = sharded(copy.deepcopy(base))
    with pk.patch_peft(on_layer=fails):
        if dist.get_rank() == 1:
            with pytest.raises(KeyError):
                peft.get_peft_model(model, config("llama"))
        else:
            peft.get_peft_model(model, config("llama"))


@together(2)
def check_after_a_pass() -> None:
    """FSDP2 keeps the parameters of the root gathered after a pass, which must not become the residuals."""
    base = build("llama", width=WIDTH)
    logits = output(base)
    model = sharded(copy.deepcopy(base))
    assert_is_base(model, logits)
    asked = config("llama", target_modules=["q_proj", "lm_head"])
    with pk.patch_peft():
        model = peft.get_peft_model(model, asked)
    assert_is_base(model, logits)
    train(model)
    with pk.original_model(model):
        assert_is_base(model, logits)


@together(2)
def check_later_adapters_and_loading() -> None:
    base = build("llama", width=WIDTH)
    logits = output(base)
    with pk.patch_peft():
        model = peft.get_peft_model(sharded(copy.deepcopy(base)), config("llama"))
        model.add_adapter("same", config("llama"))
        model.add_adapter("other", config("llama", r=6))
        model.add_adapter("plain", config("llama", init_lora_weights=True))
    for adapter in ("same", "other", "plain", "default"):
        model.set_adapter(adapter)
        assert_is_base(model, logits)
    train(model)
    trained, save = output(model), folder("loading")
    state = {key: whole(value) for key, value in model.state_dict().items()}
    if dist.get_rank() == 0:
        model.save_pretrained(save, state_dict=state, selected_adapters=["default"])
    dist.barrier()
    with pk.patch_peft():
        loaded = peft.PeftModel.from_pretrained(sharded(copy.deepcopy(base)), save)
    assert float((output(loaded) - trained).abs().max()) <= 1e-5 * float(logits.abs().max())
    with pk.original_model(loaded):
        assert_is_base(loaded, logits)

    def load_elsewhere() -> None:
        other = build("llama", width=WIDTH)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.mul_(1.5)
        with pk.patch_peft():
            peft.PeftModel.from_pretrained(sharded(other), save)

    raises_everywhere(load_elsewhere, ValueError, "the weight is not the one that the adapter's initial factors were")
    model = model.unload()
    assert_is_base(model, logits)


@together(2, 3)
def check_refusals_leave_every_process_unchanged() -> None:
    base = build("llama", width=WIDTH)
    name = "model.layers.1.mlp.down_proj"
    for value, text in ((torch.nan, f"layer {name!r}, weight (88, 264): the weight holds NaN"),):
        broken = copy.deepcopy(base)
        broken.get_submodule(name).weight.data[-1, -1] = value
        model = sharded(broken)
        before = {key: whole(parameter).clone() for key, parameter in model.named_parameters()}

        def attempt(model: Any = model) -> None:
            with pk.patch_peft():
                peft.get_peft_model(model, config("llama", target_modules=["down_proj"]))

        raises_everywhere(attempt, ValueError, text)
        for key, parameter in model.named_parameters():
            if "layers.1" in key and "lora" not in key:
                kept = before[key.replace(".base_layer", "")]
                assert torch.equal(whole(parameter).nan_to_num(7.0), kept.nan_to_num(7.0)), key

    # one process fails while it writes: the others undo theirs
    model = sharded(copy.deepcopy(base))
    before = {key: whole(parameter).clone() for key, parameter in model.named_parameters()}
    original = reference.subtract_lowrank_
    failing = dist.get_rank() == dist.get_world_size() - 1

    def subtract(*args: Any, **kwargs: Any) -> Tensor:
        if failing:
            raise torch.OutOfMemoryError("no memory left")
        return original(*args, **kwargs)

    def attempt_write() -> None:
        with pk.patch_peft(), mock.patch("pissa_kernels.ops.subtract_lowrank_", subtract):
            peft.get_peft_model(model, config("llama", target_modules=["q_proj"]))

    raises_everywhere(
        attempt_write, RuntimeError, "layer 'model.layers.0.self_attn.q_proj', weight (88, 88): no memory"
    )
    for key, parameter in model.named_parameters():
        if "lora" not in key:
            kept = before[key.replace(".base_layer", "")]
            assert float((whole(parameter) - kept).abs().max()) <= 4 * EPS * float(kept.abs().max()), key


@together(2)
def check_changes_of_weights_that_are_gathered_after_a_pass() -> None:
    """FSDP2 keeps the root's parameters gathered after a pass without gradients, and drops what is written there."""
    base = build("llama", width=WIDTH)
    logits = output(base)
    asked = config("llama", target_modules=["q_proj", "lm_head"])

    def reshard(model: Any) -> None:
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    for first in (False, True):
        with pk.patch_peft():
            if first:
                model = peft.get_peft_model(sharded(copy.deepcopy(base)), copy.deepcopy(asked))
            else:
                model = sharded_later(peft.get_peft_model(copy.deepcopy(base), copy.deepcopy(asked)))
        assert_is_base(model, logits)
        if not first:
            train(model)
            trained = output(model)
            model.merge_adapter()
            reshard(model)
            assert float((output(model) - trained).abs().max()) <= 1e-5 * float(trained.abs().max())
            model.unmerge_adapter()
            reshard(model)
            assert float((output(model) - trained).abs().max()) <= 1e-5 * float(trained.abs().max())
        unloaded = model.unload()
        reshard(model)
        for name, parameter in unloaded.named_parameters():
            expected = base.get_parameter(name)
            assert float((whole(parameter) - expected).abs().max()) <= 1e-6 * float(expected.abs().max()), name


@together(2)
def check_merges_that_fail() -> None:
    base = build("llama", width=WIDTH)
    logits = output(base)
    with pk.patch_peft():
        model = sharded_later(peft.get_peft_model(copy.deepcopy(base), config("llama")))
    train(model)
    trained = output(model)
    text = "safe_merge=True has no effect on a sharded weight"
    raises_everywhere(lambda: model.merge_adapter(safe_merge=True), ValueError, text)
    raises_everywhere(lambda: model.merge_and_unload(safe_merge=True), ValueError, text)
    failing = mock.patch.object(peft.tuners.lora.layer.Linear, "get_delta_weight", side_effect=MemoryError("none left"))
    with failing:
        raises_everywhere(model.merge_adapter, MemoryError, "none left")
    assert float((output(model) - trained).abs().max()) <= 1e-5 * float(trained.abs().max())
    with model.disable_adapter():
        assert_is_base(model, logits)


@together(2)
def check_weights_that_are_no_longer_residuals() -> None:
    """The original weights, loaded over the residuals: what needs W is refused, in every process."""
    base = build("llama", width=WIDTH)
    with pk.patch_peft():
        model = peft.get_peft_model(sharded(copy.deepcopy(base)), config("llama"))
    originals = dict(base.named_parameters())
    for name, layer in lora_layers(model):
        layer.get_base_layer().weight.data.to_local().copy_(part_of(originals[f"{name}.weight"].data, layer.weight))

    def enter() -> None:
        with pk.original_model(model):
            pass

    text = "the stored weight is no longer the one that PiSSA left here"
    raises_everywhere(enter, ValueError, text)
    raises_everywhere(model.unload, ValueError, text)
    raises_everywhere(lambda: model.add_adapter("other", config("llama", r=6)), ValueError, text)


@together(2)
def check_merging() -> None:
    base = build("llama", width=WIDTH)
    logits = output(base)
    with pk.patch_peft():
        model = peft.get_peft_model(sharded(copy.deepcopy(base)), config("llama"))
    raises_everywhere(model.merge_adapter, ValueError, "the weight is sharded, and PEFT merges into a whole one")
    assert_is_base(model, logits)
    with pk.patch_peft():
        model = peft.get_peft_model(copy.deepcopy(base), config("llama"))
    model = sharded_later(model)
    train(model)
    trained = output(model)
    model.merge_adapter()
    assert float((output(model) - trained).abs().max()) <= 1e-5 * float(trained.abs().max())
    model.unmerge_adapter()
    assert float((output(model) - trained).abs().max()) <= 1e-5 * float(trained.abs().max())


def tensor_parallel(path: Path, **sizes: int) -> Any:
    from transformers.distributed import DistributedConfig

    return transformers.AutoModelForCausalLM.from_pretrained(path, distributed_config=DistributedConfig(**sizes)).eval()


def saved(base: Any, name: str) -> Path:
    path = folder(name)
    if dist.get_rank() == 0:
        base.save_pretrained(path)
    dist.barrier()
    return path


def check_parallel(sizes: dict[str, int]) -> None:
    base = build("llama", width=96)
    logits = output(base)
    path = saved(base, "-".join(map(str, sizes.values())))
    asked = config("llama", target_modules=["embed_tokens", "q_proj", "v_proj", "o_proj", "up_proj", "down_proj"])
    with pk.patch_peft():
        alone = peft.get_peft_model(copy.deepcopy(base), copy.deepcopy(asked))
    with pk.patch_peft():
        model = peft.get_peft_model(tensor_parallel(path, **sizes), copy.deepcopy(asked))
    assert_as_one_process(model, alone, base)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            assert_is_base(model, logits)
    assert_later_use(model, base, logits, folder("later-" + path.name))
    model.add_adapter("other", config("llama", r=6))
    model.set_adapter("other")
    assert_is_base(model, logits)
    train(model)
    with model.disable_adapter():
        assert_is_base(model, logits)
    model.set_adapter("default")
    if sizes.get("tp_size", 1) > 1:
        raises_everywhere(model.merge_adapter, ValueError, "the weight is sharded, and PEFT merges into a whole one")


@together(2)
def check_tensor_parallel() -> None:
    check_parallel({"tp_size": 2})


@together(4)
def check_tensor_parallel_and_fully_shard() -> None:
    check_parallel({"tp_size": 2, "fsdp_size": 2})


@together(4)
def check_replicas_of_shards() -> None:
    check_parallel({"fsdp_size": 2, "dp_replicate_size": 2})
    base = build("llama", width=WIDTH)
    logits = output(base)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    with pk.patch_peft():
        model = peft.get_peft_model(sharded(copy.deepcopy(base), mesh=mesh), config("llama"))
    assert_is_base(model, logits)


@together(2)
def check_refused_plans() -> None:
    base = build("llama", width=96)
    path = saved(base, "plans")

    def attempt(**changes: Any) -> Callable[[], None]:
        def make() -> None:
            with pk.patch_peft():
                peft.get_peft_model(tensor_parallel(path, tp_size=2), config("llama", **changes))

        return make

    raises_everywhere(attempt(target_modules=["lm_head"]), ValueError, "divides the weight as 'colwise_gather_output'")
    raises_everywhere(attempt(use_dora=True), ValueError, "takes norms from the weight, of which tensor parallelism")


@together(2)
def check_gradients_of_corrections() -> None:
    """A second adapter beside the first one: its gradients, through the correction, are those of one process."""
    base = build("llama", width=96)
    path = saved(base, "gradients")
    targets = ["q_proj", "o_proj", "down_proj"]
    gradients = []
    for start in (lambda: copy.deepcopy(base), lambda: tensor_parallel(path, tp_size=2)):
        with pk.patch_peft():
            model = peft.get_peft_model(start(), config("llama", target_modules=targets))
            model.add_adapter("other", config("llama", r=6, target_modules=targets))
        model.set_adapter("other")
        model(input_ids=torch.arange(24).reshape(2, 12) % 100).logits.square().mean().backward()
        found = {}
        for name, layer in lora_layers(model):
            factors = layout_of(layer).factors("other")
            (A, B), (of_A, of_B) = map(whole, factors), (whole(factor.grad) for factor in factors)
            # rotating A and B against each other changes neither of these
            found[f"{name}.lora_A"], found[f"{name}.lora_B"] = B @ of_A, of_B @ A
        gradients.append(found)
    one, several = gradients
    assert set(one) == set(several)
    for name, gradient in one.items():
        assert float((several[name] - gradient).abs().max()) <= 1e-4 * float(gradient.abs().max()), name
