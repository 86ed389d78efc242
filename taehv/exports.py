"""The weights that a run hands over, as plain files."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor

from taehv.weights import export_weights

log = logging.getLogger("taehv")


@dataclass(frozen=True)
class _Export:
    name: str
    weights: Mapping[str, Tensor]
    about: Mapping[str, str]

    def copy(self) -> _Export:
        """The same in memory that no later step changes."""
        weights = {
            key: torch.empty_like(value, device="cpu").copy_(value)
            for key, value in self.weights.items()
        }
        return replace(self, weights=weights)


class Exports:
    """Weights as FOLDER/NAME.pth and .safetensors, written by the main process.

    Whatever the disk refuses costs training nothing: it is told, kept in memory and
    tried again with every later export and by `retry`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.failures = 0
        """In a row; as `missing` the same on all processes."""
        self.missing: list[str] = []
        """The names of those that are not written yet."""
        self.reason = ""
        """Why they are not."""
        self._waiting: dict[str, _Export] = {}
        self._is_main = dist.get_rank() == 0

    def write(
        self,
        kind: Literal["best", "step", "last"],
        name: str,
        weights: Mapping[str, Tensor],
        about: Mapping[str, str],
    ) -> None:
        """Write weights, or see `missing` (a collective).

        Args:
            kind: of each the newest is kept while it cannot be written.
            name: below the folder, without suffix.
            weights: whole tensors.
            about: goes into the files' metadata.
        """
        if self._is_main:
            if kind in self._waiting and self._waiting[kind].name != name:
                log.warning(f"export {self._waiting[kind].name} is given up")
            self._waiting[kind] = _Export(name, weights, about)
        self._try()
        if self._is_main and name in self.missing:
            log.warning(
                f"export {name} is not written ({self.reason}); it is kept in memory "
                f"and tried again; failures in a row: {self.failures}"
            )

    def retry(self) -> None:
        """Try again what is missing (a collective), which costs nothing else."""
        if self.missing:
            self._try()

    def about(self, name: str) -> dict[str, str]:
        """What the weights of a name are; empty where there are none."""
        try:
            with safe_open(self.folder / f"{name}.safetensors", "pt") as file:
                return file.metadata() or {}
        except (OSError, SafetensorError):
            return {}

    def _try(self) -> None:
        reason = self._write_all() if self._is_main else ""
        told = [([export.name for export in self._waiting.values()], reason)]
        dist.broadcast_object_list(told, src=0)
        (self.missing, self.reason), before = told[0], self.failures
        self.failures = before + 1 if self.missing else 0
        if self._is_main and before and not self.missing:
            log.info(f"{self.folder} can be written again: no export is missing")

    def _write_all(self) -> str:
        """Write what waits; returns why some of it cannot be written."""
        reason = ""
        for kind, export in list(self._waiting.items()):
            try:
                export_weights(self.folder / export.name, export.weights, export.about)
            except OSError as error:
                reason = str(error)
                self._waiting[kind] = export.copy()
            else:
                del self._waiting[kind]
        return reason
