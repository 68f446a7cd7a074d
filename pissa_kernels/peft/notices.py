"""Warnings of an injection: one for each kind, whatever the number of layers."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field

SHOWN = 4


@dataclass
class Notices:
    """What a user is told about layers that are initialized in another way than asked, or not at all.

    Attributes:
        left_alone: layers on the meta device.
        limited: layers that are too small for the rank, each with the rank that it got.
        read_elsewhere: layers whose weight another module reads under some condition, each with that module.
        plain: layers that nothing has initialized, with their classes.
        dequantized: layers whose dequantized weight is taken for the original one.
    """

    left_alone: list[str] = field(default_factory=list)
    limited: list[str] = field(default_factory=list)
    read_elsewhere: list[str] = field(default_factory=list)
    plain: list[str] = field(default_factory=list)
    dequantized: list[str] = field(default_factory=list)

    def warn(self) -> None:
        """Give the warnings, and forget them."""
        for names, what in (
            (
                self.left_alone,
                "the weight or the adapter is on the meta device (low_cpu_mem_usage=True, or a model without values), "
                "so PiSSA leaves them as they are, for a checkpoint to fill. Unless that has the residual and its "
                "adapter, initialize a model that is loaded",
            ),
            (
                self.limited,
                "the rank exceeds the smaller side of the weight, so the adapter has the rank given here, written to "
                "the config's rank_pattern; its scaling is unchanged. Set rank_pattern yourself, or leave the layer "
                "out with exclude_modules",
            ),
            (
                self.read_elsewhere,
                "another module reads the weight under some condition without its adapter, and then computes with the "
                "residual. Leave the layer out with exclude_modules unless that condition never holds",
            ),
            (
                self.plain,
                "PiSSA does not initialize this kind of layer, and its adapter is a plain LoRA. Leave the layer out "
                "with exclude_modules if it should have none",
            ),
            (
                self.dequantized,
                "original='dequantized': the dequantized weight is taken for the original one, and quantizing its "
                "residual loses more than leaving it as it was. Pass the 16-bit checkpoint if there is one",
            ),
        ):
            if names:
                more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
                warnings.warn(f"{', '.join(names[:SHOWN])}{more}: {what}.", stacklevel=4)
                names.clear()
