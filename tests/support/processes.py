"""One process of peft/layers/test_distributed.py: initialize a model and compare its bits with the other processes."""

from __future__ import annotations

import contextlib
import hashlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import peft
import torch
import torch.distributed as dist
from torch import nn

import pissa_kernels as pk

from .adapted import config, lora_layers
from .models import build


def digest(model: nn.Module) -> str:
    """SHA-256 of every residual, A and B."""
    total = hashlib.sha256()
    for name, layer in sorted(lora_layers(model).items()):
        factors = (factor["default"].weight for factor in (layer.lora_A, layer.lora_B))
        for tensor in (layer.get_base_layer().weight, *factors):
            total.update(name.encode() + tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def plain() -> str:
    """DDP: each process initializes its own replica. Random seed and number of threads must not matter."""
    rank = dist.get_rank()
    torch.manual_seed(rank)
    torch.set_num_threads(1 + rank)  # each layer runs on one thread
    with pk.patch_peft():
        model = peft.get_peft_model(build("llama", torch.bfloat16), config("llama"))
    for parameter in model.parameters():  # DDP takes one dtype per bucket
        parameter.requires_grad_("lora_" in "".join(name for name, p in model.named_parameters() if p is parameter))
    replica = nn.parallel.DistributedDataParallel(model)
    ids = torch.arange(24).reshape(2, 12) + rank
    replica(input_ids=ids).logits.square().mean().backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert gradients
    return digest(model)


def partitioned() -> str:
    """DeepSpeed ZeRO-3 as PEFT's gather presents it: a weight is complete only inside the context.

    Entering it collects the parts of all processes. Leaving it broadcasts the weight of process 0, and each process
    keeps its own part.
    """
    from peft.tuners.lora import layer as peft_layer

    base = build("llama", torch.bfloat16)
    weights = {id(parameter): parameter for parameter in base.parameters() if parameter.ndim == 2}
    shapes = {key: parameter.shape for key, parameter in weights.items()}
    parts: dict[int, torch.Tensor] = {}

    def drop(parameter: nn.Parameter) -> None:
        parts[id(parameter)] = parameter.data.reshape(-1).chunk(dist.get_world_size())[dist.get_rank()].clone()
        parameter.data = torch.empty(0, dtype=parameter.dtype)

    def collect(parameter: nn.Parameter) -> None:
        own = parts[id(parameter)]
        others = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(others, own)
        parameter.data = torch.cat(others).reshape(shapes[id(parameter)])

    @contextlib.contextmanager
    def gather(parameter: nn.Parameter, *args: Any, **kwargs: Any) -> Iterator[None]:
        collect(parameter)
        yield
        dist.broadcast(parameter.data, 0)
        drop(parameter)

    for parameter in weights.values():
        parameter.ds_id, parameter.ds_shape = id(parameter), parameter.shape  # type: ignore[attr-defined]
        drop(parameter)
    peft_layer.gather_params_ctx = gather
    with pk.patch_peft():
        model = peft.get_peft_model(base, config("llama"))
    assert all(not parameter.numel() for parameter in weights.values())
    for parameter in weights.values():
        collect(parameter)
    return digest(model)


def deepspeed() -> str:
    """ZeRO-3 with DeepSpeed itself."""
    import deepspeed as ds
    from transformers.integrations import HfDeepSpeedConfig

    settings = {"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 1, "bf16": {"enabled": True}}
    ds.init_distributed(dist_backend="gloo", dist_init_required=False)
    kept = HfDeepSpeedConfig(settings)  # transformers keeps only a weak reference to it
    base = build("llama", torch.bfloat16)
    ds.zero.Init(module=base, config_dict_or_path=settings, dtype=torch.bfloat16)
    assert all(not parameter.numel() for parameter in base.parameters())
    with pk.patch_peft():
        model = peft.get_peft_model(base, config("llama"))
    del kept
    with ds.zero.GatheredParameters(list(model.parameters())):
        return digest(model)


WAYS: dict[str, Callable[[], str]] = {function.__name__: function for function in (plain, partitioned, deepspeed)}


def main(way: str, address: str, world: int, rank: int) -> None:
    torch.set_num_threads(1)  # a gathered layer runs on all threads, and the order of BLAS sums depends on their number
    dist.init_process_group("gloo", init_method=f"file://{address}", world_size=world, rank=rank)
    mine = WAYS[way]()
    found: list[str] = [""] * world
    dist.all_gather_object(found, mine)
    print(*found)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
