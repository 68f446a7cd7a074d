"""Quantized weights in a checkpoint: which tensors belong to one, and its values."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import Tensor

from .bnb import EightBit, FourBit
from .scheme import Packed

_STATE = "weight.quant_state.bitsandbytes__"


@dataclass(frozen=True)
class StoredWeight:
    """The tensors of one quantized weight.

    Attributes:
        module: name of its module in the checkpoint.
        kind: "nf4", "fp4" or "int8".
        keys: key of each tensor, by what follows the module's name and a dot, such as "weight.absmax".
    """

    module: str
    kind: str
    keys: dict[str, str]

    def read(self, read: Callable[[str], Tensor]) -> Packed:
        """The weight.

        Args:
            read: reads the tensor of a key.

        Raises:
            ValueError: the tensors do not belong together; the message names the module.
        """
        tensors = {suffix: read(key) for suffix, key in self.keys.items()}
        try:
            return EightBit().unpack(tensors) if self.kind == "int8" else FourBit().unpack(tensors)
        except (KeyError, ValueError, RuntimeError) as error:
            raise ValueError(f"module {self.module!r}: its quantized weight is damaged: {error}") from None


def quantized_weights(keys: Iterable[str]) -> dict[str, StoredWeight]:
    """The quantized weights among the tensors of a checkpoint, by the key of the codes.

    Args:
        keys: keys of all tensors.
    """
    modules: dict[str, dict[str, str]] = defaultdict(dict)
    for key in keys:
        name, dot, suffix = key.rpartition(".weight.")
        suffix = f"weight.{suffix}" if dot else key.rpartition(".")[2]
        modules[name if dot else key.rpartition(".")[0]][suffix] = key
    found = {}
    for module, tensors in modules.items():
        kind = next((suffix.removeprefix(_STATE) for suffix in tensors if suffix.startswith(_STATE)), None)
        kind = kind or ("int8" if "SCB" in tensors else None)
        if kind is not None and "weight" in tensors:
            belonging = {
                suffix: key for suffix, key in tensors.items() if suffix.startswith("weight") or suffix == "SCB"
            }
            found[tensors["weight"]] = StoredWeight(module, kind, belonging)
    return found
