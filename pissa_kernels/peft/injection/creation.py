"""Where PEFT creates the adapter of a layer that PiSSA initializes.

PEFT makes A and B as ``nn.Linear`` on the CPU, fills them with random numbers, and moves them to the device of the
weight. PiSSA overwrites both: for a model on a GPU the numbers and the copies take longer than the decomposition.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ...checks import asks_for_pissa

# Fill a tensor with random numbers. A mode sees the outermost function only, and torch.nn.init has some of its own.
RANDOM = frozenset((nn.init.kaiming_uniform_, nn.init.uniform_, nn.init.normal_, Tensor.uniform_, Tensor.normal_))


class _Zeros(TorchFunctionMode):
    """Zeros in the place of random numbers, in the thread that has entered this mode."""

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function in RANDOM:
            tensor: Tensor = args[0] if args else kwargs["tensor"]
            with torch.no_grad():
                return tensor.zero_()
        return function(*args, **kwargs)


@contextlib.contextmanager
def creating(config: Any, target: nn.Module, parameter: str | None = None) -> Iterator[None]:
    """Context in which PEFT creates an adapter of zeros on the device of the weight, if PiSSA will initialize it.

    Args:
        config: the ``LoraConfig``.
        target: the module that PEFT replaces, or the LoRA layer that gets another adapter.
        parameter: name of a parameter of the module (``target_parameters``); None for the module.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    init, base = config.init_lora_weights, target
    if isinstance(target, BaseTunerLayer):
        base = target.get_base_layer()
    weight: Any = getattr(base, parameter or "weight", None)
    if asks_for_pissa(init) and _is_initialized(base, weight, parameter):
        # every call of torch passes through each mode, so the device is set only where it is another one
        elsewhere = weight.device != torch.get_default_device()
        with torch.device(weight.device) if elsewhere else contextlib.nullcontext(), _Zeros():
            yield
    else:
        yield


def _is_initialized(base: nn.Module, weight: Any, parameter: str | None) -> bool:
    """Whether PiSSA initializes a weight, and not only a part of what PEFT creates, as in an attention."""
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    return (
        (parameter is not None or isinstance(base, kinds) or type(base).__name__ == "Conv1D")
        and isinstance(weight, Tensor)
        and type(weight.data) is Tensor
        and not weight.is_meta
        and weight.ndim >= 2
        and weight.is_floating_point()
    )
