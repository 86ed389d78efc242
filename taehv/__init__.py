"""TAEHV: tiny video autoencoders, and the trainer for them.

What is public is imported when it is first asked for: the model takes PyTorch's
compiler along, and seconds that a mistyped setting or a decoding process can spare.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from taehv.model import TAEHV
    from taehv.streaming import StreamingTAEHV
    from taehv.variants import VARIANTS

__all__ = ["TAEHV", "VARIANTS", "StreamingTAEHV"]
_FROM = {"TAEHV": "model", "VARIANTS": "variants", "StreamingTAEHV": "streaming"}


def __getattr__(name: str) -> object:
    if name not in _FROM:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_FROM[name]}"), name)
