"""One process of tests/peft/saving/test_gathering.py: a model that several processes hold together is saved and merged.

Prints "done" at the end. The files that it writes are read by the test, in one process.
"""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.distributed as dist
from torch import nn

import pissa_kernels as pk
from pissa_kernels.peft.saving import save as saving
from pissa_kernels.peft.weights.first_pass import FirstPass

from .adapted import config, lora_layers
from .models import build

IDS = torch.arange(24).reshape(2, 12) * 4
ADAPTER, RESIDUAL, TRAINED = "adapter", "residual", "trained.pt"


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits  # type: ignore[no-any-return]


def made(base: Any) -> Any:
    with pk.patch_peft(progress=False):
        return peft.get_peft_model(base, config("llama")).eval()


def train(model: Any) -> None:
    """Move A and B in place, each process its own part of them, as an optimizer does."""
    for name, parameter in sorted(model.named_parameters()):
        if "lora_" in name:
            parameter.data.mul_(1.5)


def error_of(call: Callable[[], object]) -> str:
    """Message of the error of a call, which has one line."""
    with pytest.raises(ValueError, match=r"\A[^\n]+\Z") as raised:
        call()
    return str(raised.value)


def agree(value: object) -> None:
    """Fail unless all processes have found the same."""
    found: list[object] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    assert found == [value] * len(found), found


def share(model: Any) -> None:
    from torch.distributed.fsdp import fully_shard

    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    for layer in _decoder(model).layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def _decoder(model: Any) -> Any:
    return model.get_base_model().model if hasattr(model, "get_base_model") else model.model


def save(model: Any, folder: Path) -> None:
    """The adapter with a whole state dict, and the residual model, of a model of FSDP2."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    torch.save(logits(model), folder / TRAINED)
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    model.save_pretrained(folder / ADAPTER, state_dict=state, is_main_process=dist.get_rank() == 0)
    pk.save_pissa(model, folder / RESIDUAL)
    assert (folder / RESIDUAL / "pissa_init" / "adapter_model.safetensors").is_file()  # in every process


def fsdp2(folder: Path) -> None:
    model = made(build("llama"))
    share(model)
    train(model)
    logits(model)
    message = error_of(lambda: model.save_pretrained(folder / ADAPTER))
    assert "a DTensor, of which this process has a part" in message
    assert not (folder / ADAPTER).exists()
    dist.barrier()
    save(model, folder)
    agree(error_of(lambda: pk.save_pissa(model, folder / "other", adapter_name="other")))
    dist.barrier()
    if dist.get_rank() == 0:  # the other one comes late: nothing may have been written until then
        pk.save_pissa(model, folder / "late")
    else:
        time.sleep(2)
        assert not (folder / "late").exists()
        pk.save_pissa(model, folder / "late")
    with pytest.raises((FileExistsError, RuntimeError), match="is not an empty folder"):
        pk.save_pissa(model, folder / "late")


def sharded_first(folder: Path) -> None:
    base = build("llama")
    share(base)
    model = made(base)
    train(model)
    save(model, folder)


def checkpointed(folder: Path) -> None:
    """With a tied embedding as well, which is gathered once."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing

    base = build("llama")
    base.lm_head.weight = base.model.embed_tokens.weight
    base.config.tie_word_embeddings = True
    model = made(base)
    apply_activation_checkpointing(model, check_fn=lambda module: type(module).__name__ == "LlamaDecoderLayer")
    share(model)
    train(model)
    save(model, folder)


def failing(folder: Path) -> None:
    """What fails in the first process alone fails in both, and leaves nothing."""
    model = made(build("llama"))
    share(model)

    def fail(*_: Any) -> None:
        raise OSError("no space left")

    saving._save_base = fail
    with pytest.raises((OSError, RuntimeError), match="no space left"):
        pk.save_pissa(model, folder / RESIDUAL)
    assert not list(folder.iterdir())
    weight = _decoder(model).layers[1].mlp.up_proj.base_layer.weight
    weight.to_local().add_(0.1)
    with pytest.raises(ValueError, match=r"layer 'model.layers.1.mlp.up_proj'.* no longer the one that PiSSA left"):
        pk.save_pissa(model, folder / RESIDUAL)
    assert not list(folder.iterdir())


def tensor_parallel(folder: Path) -> None:
    import transformers

    if dist.get_rank() == 0:
        build("llama").save_pretrained(folder / "base")
    dist.barrier()
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    factory = transformers.LlamaForCausalLM
    base = factory.from_pretrained(folder / "base", tp_plan="auto", device_mesh=mesh).eval()
    assert any(type(parameter.data).__name__ == "DTensor" for parameter in base.parameters())
    model = made(base)
    train(model)
    torch.save(logits(model), folder / TRAINED)
    model.save_pretrained(folder / ADAPTER, is_main_process=dist.get_rank() == 0)
    pk.save_pissa(model, folder / RESIDUAL)


def fsdp1(folder: Path) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel as Fsdp
    from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    model = made(build("llama"))
    policy = functools.partial(transformer_auto_wrap_policy, transformer_layer_cls={LlamaDecoderLayer})
    wrapped = Fsdp(model, use_orig_params=True, auto_wrap_policy=policy, device_id=torch.device("cpu"))
    train(model)
    torch.save(logits(wrapped), folder / TRAINED)
    first = dist.get_rank() == 0
    if first:
        assert "summon_full_params" in error_of(lambda: model.save_pretrained(folder / ADAPTER))
        assert not (folder / ADAPTER).exists()
    agree(error_of(lambda: pk.save_pissa(model, folder / RESIDUAL)))
    for method in (model.merge_adapter, model.unload):
        assert "summon_full_params" in error_of(method)
    with Fsdp.summon_full_params(wrapped):
        model.save_pretrained(folder / ADAPTER, is_main_process=first)
        pk.save_pissa(model, folder / RESIDUAL)
        model.merge_adapter()
    torch.testing.assert_close(logits(wrapped), torch.load(folder / TRAINED), rtol=1e-4, atol=1e-5)


# by default DeepSpeed does not partition small parameters
ZERO3 = {
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "train_micro_batch_size_per_gpu": 2,
}


def partitioned() -> Any:
    import deepspeed

    deepspeed.init_distributed(dist_backend="gloo", dist_init_required=False)
    base = build("llama")
    deepspeed.zero.Init(module=base, config_dict_or_path=ZERO3, dtype=torch.float32)
    return base


def zero3(folder: Path) -> None:
    import deepspeed
    from transformers.integrations import HfDeepSpeedConfig

    kept = HfDeepSpeedConfig(ZERO3)  # transformers keeps only a weak reference to it; with it, PEFT gathers each layer
    model = made(partitioned())
    engine = deepspeed.initialize(model=model, config=ZERO3)[0]
    message = error_of(lambda: pk.save_pissa(model, folder / RESIDUAL))
    assert message.startswith("DeepSpeed ZeRO-3 has partitioned ")
    assert "GatheredParameters(list(" in message
    agree(message)
    start = logits(engine)
    for method in (model.merge_adapter, model.merge_and_unload, model.unload):
        message = error_of(method)
        assert message.startswith("layer 'model.layers.0.self_attn.q_proj', weight")
        assert "modifier_rank=0" in message
        agree(message)
    assert torch.equal(logits(engine), start)
    parameters = list(model.parameters())
    with deepspeed.zero.GatheredParameters(parameters, modifier_rank=0):
        train(model)
    torch.save(logits(engine), folder / TRAINED)
    if dist.get_rank() == 0:
        assert "GatheredParameters(list(" in error_of(lambda: model.save_pretrained(folder / ADAPTER))
        assert not (folder / ADAPTER).exists()
    with deepspeed.zero.GatheredParameters(parameters):
        model.save_pretrained(folder / ADAPTER, is_main_process=dist.get_rank() == 0)
        pk.save_pissa(model, folder / RESIDUAL)
    with deepspeed.zero.GatheredParameters(parameters, modifier_rank=0):
        model.merge_adapter()
    error_of(model.unmerge_adapter)
    torch.testing.assert_close(logits(engine), torch.load(folder / TRAINED), rtol=1e-4, atol=1e-5)
    with deepspeed.zero.GatheredParameters(parameters, modifier_rank=0):
        model.unmerge_adapter()
    torch.testing.assert_close(logits(engine), torch.load(folder / TRAINED), rtol=1e-4, atol=1e-5)
    del kept


def modifier_rank(folder: Path) -> None:
    """DeepSpeed drops the residual without ``modifier_rank=0``, which the first pass notices."""
    import deepspeed

    for modifier in (None, 0):
        base = partitioned()
        with deepspeed.zero.GatheredParameters(list(base.parameters()), modifier_rank=modifier):
            model = made(base)
        waiting = [hook for each in model.modules() for hook in each._forward_hooks.values() if is_first_pass(hook)]
        assert len(waiting) == len(list(lora_layers(model)))
        engine = deepspeed.initialize(model=model, config=ZERO3)[0]
        if modifier is None:
            for _ in range(2):
                message = error_of(functools.partial(logits, engine))
                assert message.startswith("layer 'model.layers.0.self_attn.q_proj', weight")
                assert "modifier_rank=0" in message
                agree(message)
            continue
        torch.save(logits(engine), folder / TRAINED)
        assert not [hook for each in model.modules() for hook in each._forward_hooks.values() if is_first_pass(hook)]
        with deepspeed.zero.GatheredParameters(list(model.parameters())):
            pk.save_pissa(model, folder / RESIDUAL)


def is_first_pass(hook: object) -> bool:
    return isinstance(hook, FirstPass)


WAYS: dict[str, Callable[[Path], None]] = {
    function.__name__: function
    for function in (
        fsdp2,
        sharded_first,
        checkpointed,
        failing,
        tensor_parallel,
        fsdp1,
        zero3,
        modifier_rank,
    )
}


def main(way: str, folder: str, world: int, rank: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}.rendezvous", world_size=world, rank=rank)
    WAYS[way](Path(folder))
    dist.barrier()
    print("done")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
