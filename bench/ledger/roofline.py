"""What a device can do, and the time that it takes for recorded operations at best."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from .events import UNITS, Event, Line


@dataclass(frozen=True)
class Roofline:
    """Rates of a device, sustained.

    Attributes:
        name: name of the device.
        memory: bytes per second of its memory.
        flops: operations per second by unit.
        launch: seconds of the host per kernel.
        step: seconds of a step that waits for the one before: some hundred dependent instructions, a synchronization.
            The shortest kernel takes five.
        bus: bytes per second between host and device, in each direction.
    """

    name: str
    memory: float
    flops: Mapping[str, float] = field(hash=False)
    launch: float
    step: float
    bus: float

    def line(self, event: Event, times: float, sizes: Mapping[str, int]) -> Line:
        """The line of an event that occurs ``times`` times on weights of these sizes."""
        size = sum(operand.bytes(sizes) for operand in event.operands)
        flops = dict.fromkeys(UNITS, 0)
        for unit, factors in event.flops:
            flops[unit] += math.prod(factor.value(sizes) for factor in factors)
        busy = sum(count / self.flops[unit] for unit, count in flops.items())
        waiting = self.step * event.steps
        return Line(
            launches=times * event.launches,
            waits=times * event.waits,
            bytes=0.0 if event.transfer else times * size,
            transferred=times * size if event.transfer else 0.0,
            flops={unit: times * count for unit, count in flops.items()},
            seconds=times * (size / self.bus if event.transfer else max(size / self.memory, busy, waiting)),
        )


# 3.35 TB/s, of which a copy reaches nine tenths; dense rates that large products reach, not the peaks of the data sheet
H100 = Roofline(
    "H100 SXM",
    memory=0.9 * 3.35e12,
    flops={"bf16": 600e12, "tf32": 300e12, "fp32": 40e12},
    launch=10e-6,  # of Triton, from Python
    step=6e-7,
    bus=50e9,
)
