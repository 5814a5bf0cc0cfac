"""Records: what a clipping strategy keeps on each device that it steps, and how that comes into a checkpoint.

A record is one float64 tensor a device: the strategy's settings, then what it remembers. All devices take in the same
norms, so all records are equal.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from .adaptive import Remembering
from .fixed import Clip

__all__ = ["Records"]


class Records:
    """The records of an optimizer's clip."""

    def __init__(self, clip: Clip | None) -> None:
        self._clip = clip
        self._settings = [float(getattr(clip, name)) for name in clip.settings] if clip is not None else []
        self._remembered: list[float] = []  # as loaded, where no device has a record yet
        self._records: dict[torch.device, Tensor] = {}

    def on(self, device: torch.device) -> Tensor:
        """The record of a device; a new one is as those of other devices are, or as was loaded."""
        record = self._records.get(device)
        if record is None:
            others = list(self._records.values())
            record = others[0].to(device, non_blocking=True) if others else _sent(self._numbers(), device)
            self._records[device] = record
        return record

    def share(self, devices: Collection[torch.device]) -> None:
        """Bring the records of devices that took no part in a step up to those of the devices that did."""
        if len(self._records) > 1 and isinstance(self._clip, Remembering):
            for device in self._records.keys() - set(devices):
                self._records[device].copy_(self._records[next(iter(devices))], non_blocking=True)

    def _numbers(self) -> list[float]:
        kept = self._clip.packed(self._remembered) if isinstance(self._clip, Remembering) else []
        return [*self._settings, *kept]

    def save(self) -> list[Any]:
        """What is remembered, as plain data: the name of the strategy, then numbers. This waits for the device."""
        if not isinstance(self._clip, Remembering):
            return []
        for record in self._records.values():
            self._remembered = self._clip.unpacked(record.tolist()[len(self._settings) :])
            break
        return [type(self._clip).__name__, *self._remembered]

    def check(self, saved: Any) -> list[float]:
        """What this strategy is to remember of saved data: nothing, where another strategy saved it.

        Raises:
            ValueError: where the data is not what ``save`` gives.
        """
        if not isinstance(saved, Sequence) or isinstance(saved, str):
            raise ValueError(f"the statistics of a clip must be a list, but got {type(saved).__name__}")
        if not saved or not isinstance(self._clip, Remembering) or saved[0] != type(self._clip).__name__:
            return []
        numbers = list(saved[1:])
        if not all(isinstance(x, (int, float)) and 0 <= x < math.inf for x in numbers):
            raise ValueError(f"the statistics of {saved[0]} must be finite numbers >= 0, but got {numbers!r}")
        self._clip.packed(numbers)
        return numbers

    def load(self, saved: Any) -> None:
        """Remember saved data; the records keep their addresses."""
        self._remembered = self.check(saved)
        for device, record in self._records.items():
            record.copy_(_sent(self._numbers(), device))


def _sent(numbers: Sequence[float], device: torch.device) -> Tensor:
    """Numbers on a device, without a wait: from memory that torch keeps until the copy has passed."""
    host = torch.tensor(numbers, dtype=torch.float64, device="cpu")
    return host if device.type == "cpu" else host.pin_memory().to(device, non_blocking=True)
