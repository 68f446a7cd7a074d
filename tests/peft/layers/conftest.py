"""Fixtures of the tests of batches."""

from __future__ import annotations

from ...support.fixed_schedule import fixed_schedule
from ...support.gpus import gpus
from ...support.streams import streams

__all__ = ["fixed_schedule", "gpus", "streams"]
