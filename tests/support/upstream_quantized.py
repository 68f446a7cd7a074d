"""A pytest plugin with which PEFT's GPU tests of quantized PiSSA run on a CPU.

bitsandbytes quantizes on CPUs too, but PEFT skips the whole file without a GPU. The skips are removed, "to(0)" moves to
the CPU, and tiny random models, in folders of the names that the tests load, take the place of those of the hub.
"""

from __future__ import annotations

import functools
from typing import Any

import accelerate.test_utils.testing
import bitsandbytes
import pytest
import torch

MODELS = ("peft-internal-testing/tiny-random-BloomForCausalLM", "t5-small", "gpt2")


def pytest_configure() -> None:
    import tests.testing_utils  # noqa: F401  PEFT's: its tests run on the device that get_backend tells these

    accelerate.test_utils.testing.get_backend = lambda: ("any", 0, None)  # and skip a file where it tells "cpu"
    torch.manual_seed(0)
    for name, model in zip(MODELS, _models(), strict=True):
        model.save_pretrained(name)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for node in item.listchain():
            node.own_markers[:] = [marker for marker in node.own_markers if marker.name != "skipif"]


def _models() -> list[Any]:
    import transformers as t

    sizes: dict[str, Any] = {"n_layer": 2, "n_head": 4, "vocab_size": 100, "bos_token_id": 0, "eos_token_id": 1}
    return [
        t.BloomForCausalLM(t.BloomConfig(hidden_size=64, **sizes)),
        t.T5ForConditionalGeneration(
            t.T5Config(vocab_size=100, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4)
        ),
        t.GPT2LMHeadModel(t.GPT2Config(n_embd=64, **sizes)),
    ]


def _on_cpu(moved: Any) -> Any:
    @functools.wraps(moved)
    def to(module: Any, *args: Any, **settings: Any) -> Any:
        return moved(module, *("cpu" if type(value) is int else value for value in args), **settings)

    return to


# On CPUs with AVX512-BF16, bitsandbytes packs a weight for its kernel, which takes multiples of 32 rows only.
bitsandbytes.nn.modules.has_avx512bf16 = lambda: False
torch.nn.Module.to = _on_cpu(torch.nn.Module.to)  # type: ignore[method-assign]
