"""What a process gives to collectives, whoever calls them."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

# The collectives of ``torch.distributed``, and those of a ``DTensor``, which call none of the others.
IN_PLACE, FUNCTIONAL = "c10d", "_c10d_functional"
# They transfer nothing.
OTHERS = ("barrier", "monitored_barrier_", "wait_tensor", "_wrap_tensor_autograd")


class Traffic(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts of the collectives within the context.

    Attributes:
        collectives: their number.
        bytes: sum over them of the larger of what this process gives and what it gets.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.collectives = 0
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if func.namespace in (IN_PLACE, FUNCTIONAL) and func.overloadpacket.__name__ not in OTHERS:
            self.collectives += 1
            # in place, there is an argument for the result and one for what is given
            self.bytes += max(map(_bytes, args if func.namespace == IN_PLACE else (made, *args)))
        return made


def _bytes(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in tree_flatten(tree)[0] if isinstance(leaf, Tensor))
