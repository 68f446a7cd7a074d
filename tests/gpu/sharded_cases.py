"""What processes with a GPU each check of sharded weights over nccl; run by ``test_sharded.py``."""

from __future__ import annotations

import copy
from typing import Any

import peft
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

import pissa_kernels as pk

from ..support.adapted import config
from ..support.models import build
from ..support.reference import energy_deficit, realistic
from ..support.together import raises_everywhere, same_everywhere, together

BACKEND = "nccl"


@together(1, 2)
def check_triplets() -> None:
    mesh = init_device_mesh("cuda", (dist.get_world_size(),))
    for shape in ((1501, 1203), (700, 2100)):
        for dtype in (torch.bfloat16, torch.float32):
            W = realistic(*shape, seed=1).to(dtype)
            for placement in (Shard(0), Shard(1)):
                found = pk.truncated_svd(distribute_tensor(W, mesh, [placement], src_data_rank=None), 16)
                same_everywhere(*found[:3])
                assert found.U.is_cuda
                assert found.certificate.converged
                assert energy_deficit(W, found.Vh.cpu()) <= 2e-6


@together(1, 2)
def check_models_under_fully_shard() -> None:
    base = build("llama", torch.bfloat16, width=256)
    ids = torch.arange(24, device="cuda").reshape(2, 12) % 100

    def logits(model: Any) -> torch.Tensor:
        with torch.no_grad():
            found: torch.Tensor = model(input_ids=ids).logits.float()
        return found

    expected = logits(copy.deepcopy(base).cuda())
    for options in ({}, {"offload_policy": CPUOffloadPolicy()}):
        model = copy.deepcopy(base).cuda()
        for block in model.model.layers:
            fully_shard(block, **options)
        fully_shard(model, **options)
        with pk.patch_peft() as report:
            model = peft.get_peft_model(model, config("llama"))
        assert len(report.layers) == 14
        if not options:  # PEFT leaves the adapter with the weights, on the CPU
            assert float((logits(model) - expected).abs().max()) <= 0.05 * float(expected.abs().max())
            with pk.original_model(model):
                assert float((logits(model) - expected).abs().max()) <= 0.05 * float(expected.abs().max())


@together(1, 2)
def check_refusal() -> None:
    W = torch.randn(300, 200)
    W[-1, -1] = torch.nan
    D = distribute_tensor(W, init_device_mesh("cuda", (dist.get_world_size(),)), [Shard(0)], src_data_rank=None)
    raises_everywhere(lambda: pk.truncated_svd(D, 4), ValueError, "NaN")
