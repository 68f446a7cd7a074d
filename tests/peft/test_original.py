"""The original model: exact within the context, refused where it is not known."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import peft
import pytest
import torch

import pissa_kernels as pk

from ..support.adapted import DTYPES, NAMES, allowed, make, moved, train
from ..support.models import output


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_the_original_model_within_the_context(name: str, dtype: torch.dtype) -> None:
    base, adapted = make(name, dtype)
    train(adapted)
    trained = output(adapted)
    with pk.original_model(adapted) as original:
        assert moved(output(base), output(original)) <= allowed(dtype)
    assert torch.equal(trained, output(adapted))
    with adapted.disable_adapter():
        assert moved(output(base), output(adapted)) <= allowed(dtype)
    assert moved(output(base), trained) > 3 * allowed(dtype)


def test_a_graph_that_waits_for_its_backward_pass_stays_valid() -> None:
    _, adapted = make("llama", torch.float32)
    train(adapted)
    ids = torch.arange(24).reshape(2, 12)

    def gradients(between: bool) -> list[torch.Tensor]:
        adapted.zero_grad()
        logits = adapted(input_ids=ids).logits
        if between:
            with pk.original_model(adapted), torch.no_grad():
                reference = adapted(input_ids=ids).logits
            assert not reference.requires_grad
        logits.square().mean().backward()
        return [p.grad.clone() for p in adapted.parameters() if p.grad is not None]

    alone, disturbed = gradients(False), gradients(True)
    assert len(alone) == len(disturbed) > 0
    assert all(torch.equal(one, other) for one, other in zip(alone, disturbed, strict=True))


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_copies_keep_their_records(way: str, tmp_path: Path) -> None:
    base, adapted = make("llama", torch.float32)
    train(adapted)
    other = copy.deepcopy(adapted) if way == "deepcopy" else pickle.loads(pickle.dumps(adapted))
    with pk.original_model(other):
        assert moved(output(base), output(other)) <= allowed(torch.float32)
    other.base_model.model.model.layers[0].self_attn.q_proj.lora_A["default"].weight.data.zero_()
    other.save_pretrained(tmp_path)  # the weights of the copy
    with pk.patch_peft():
        loaded = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    assert torch.equal(output(loaded), output(other))


def test_refusals_of_original_model() -> None:
    base, adapted = make("llama", torch.float32)
    with pytest.raises(ValueError, match="no layer of this model was initialized"), pk.original_model(base):
        pass
    adapted.merge_adapter()
    with pytest.raises(ValueError, match=r"merged into layer .* and 13 more; unmerge"), pk.original_model(adapted):
        pass
