"""TAEHV: tiny video autoencoders, and the trainer for them."""

from __future__ import annotations

from taehv.model import TAEHV
from taehv.streaming import StreamingTAEHV
from taehv.variants import VARIANTS

__all__ = ["TAEHV", "VARIANTS", "StreamingTAEHV"]
