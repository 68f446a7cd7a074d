"""Models in the shards of several processes, and what they must be: equal to one process's, in all that follows."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import fully_shard

import pissa_kernels as pk
from pissa_kernels.adapter.layers import lora_layers
from pissa_kernels.adapter.layouts import layout_of
from pissa_kernels.peft.weights.record import of_adapter
from pissa_kernels.runtime.shards import is_sharded

from .models import output
from .reference import EPS, ROUNDOFF
from .together import same_everywhere

# Widths that three processes do not divide evenly.
WIDTH = 88
DTYPES = (torch.float32, torch.bfloat16)


def sharded(model: Any, **options: Any) -> Any:
    """The model with FSDP2 on every block and on itself."""
    blocks = model.transformer.h if hasattr(model, "transformer") else model.model.layers
    for block in blocks:
        fully_shard(block, **options)
    return fully_shard(model, **options)


def whole(tensor: Any) -> Tensor:
    """A tensor, gathered from all processes where it is sharded."""
    found: Tensor = (tensor.full_tensor() if is_sharded(tensor) else tensor).detach()
    return found


def layers_of(model: Any) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """The whole weight, A and B of every layer."""
    found = {}
    for name, layer in lora_layers(model):
        layout = layout_of(layer)
        found[name] = tuple(map(whole, (layout.weight, *layout.factors("default"))))
    return found  # type: ignore[return-value]


def assert_as_one_process(model: Any, alone: Any, base: Any) -> None:
    """A, B and the residual are those that one process finds, to rounding, and the same bits in all.

    In bfloat16 an element of A, B or the residual that lies between two numbers may be rounded to either.
    """
    weights = dict(base.named_parameters())
    expected = layers_of(alone)
    for (name, layer), (found_name, (W, A, B)) in zip(lora_layers(model), layers_of(model).items(), strict=True):
        assert name == found_name
        W1, A1, B1 = expected[name]
        record, first = of_adapter(layer, "default"), of_adapter(dict(lora_layers(alone))[name], "default")
        assert record is not None
        assert first is not None
        same_everywhere(W, A, B, record.lora_A, record.lora_B, record.before, record.after)
        largest = float(first.report.singular_values.amax())
        u = ROUNDOFF[W.dtype]
        layout = layout_of(layer)
        products = [
            right.float() @ left.float()
            for lefts, rights in (layout.split(A, B), layout.split(A1, B1))
            for left, right in zip(lefts, rights, strict=True)
        ]
        half = len(products) // 2
        for one, other in zip(products[:half], products[half:], strict=True):
            assert float((one - other).abs().max()) <= (u / 4 + 30 * EPS) * largest, name
        original = weights[f"{name}.{layout.parameter}" if f"{name}.{layout.parameter}" in weights else name]
        assert float((W.float() - W1.float()).abs().max()) <= (u / 2 + 30 * EPS) * largest, name
        stored = layout.stack(W).float()
        for part, product in enumerate(products[:half]):
            total = stored[part] + layout.scalings["default"] * (product.mT if layout.transposed else product)
            bound = 1.01 * u * float(stored.abs().max()) + 20 * EPS * largest
            assert float((total - layout.stack(original.detach())[part].float()).abs().max()) <= bound, name
        assert torch.equal(record.before, first.before), name
        assert [report.name for report in (record.report, first.report)] == [name, name]


def assert_is_base(model: Any, logits: Tensor, roundings: float = 40) -> None:
    dtype = next(model.parameters()).dtype
    assert float((output(model) - logits).abs().max()) <= roundings * ROUNDOFF[dtype] * float(logits.abs().max())


def train(model: Any, steps: int = 2) -> None:
    """Some steps of a loss that is large in every layer; every process has the same batch."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.5)
    ids = torch.arange(24).reshape(2, 12) % 100
    for _ in range(steps):
        loss = model(input_ids=ids).logits.float().square().mean()
        loss.backward()
        for parameter in parameters:
            if not is_sharded(parameter) and parameter.grad is not None:
                dist.all_reduce(parameter.grad)
        optimizer.step()
        optimizer.zero_grad()


def assert_later_use(model: Any, base: Any, logits: Tensor, save: Path) -> None:
    """Without the adapter the base model; training, saving, and loading in one process."""
    with pk.original_model(model):
        assert_is_base(model, logits)
    with model.disable_adapter():
        assert_is_base(model, logits)
    train(model)
    trained = output(model)
    moved = float((trained - logits).abs().max() / logits.abs().max())
    assert moved > 1e-3, moved
    with model.disable_adapter():
        assert_is_base(model, logits)
    state = {key: whole(value) for key, value in model.state_dict().items()}
    if dist.get_rank() == 0:
        model.save_pretrained(save / "trained", state_dict=state)
        with pk.patch_peft():
            loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), save / "trained")
        dtype = next(base.parameters()).dtype
        assert float((output(loaded) - trained).abs().max()) <= 40 * ROUNDOFF[dtype] * float(logits.abs().max())
    dist.barrier()


def sharded_later(model: Any) -> Any:
    """A PEFT model, sharded after the adapter was made, as accelerate does it."""
    for block in model.base_model.model.model.layers:
        fully_shard(block)
    return fully_shard(model)
