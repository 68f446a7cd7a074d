"""Fixtures of the tests of copies."""

from __future__ import annotations

from ..support.streams import streams

__all__ = ["streams"]
