"""The most memory that one job took, also in a process that does many of them."""

from __future__ import annotations

import resource
from pathlib import Path

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_RESET_PEAK = "5"  # see proc(5)


class PeakMemory:
    """Counts from when it is made.

    On a GPU torch's allocator counts the bytes of its tensors. On a CPU it is the resident memory of the whole
    process, loaded models included; where the kernel cannot start its count anew, that since the process began.

    Args:
        device: where the job computes.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._anew = False
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        else:
            self._anew = _start_anew()

    @property
    def bytes(self) -> int:
        """The peak so far."""
        if self._device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self._device))
        if self._anew:
            (line,) = (line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
            return int(line.split()[1]) * 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _start_anew() -> bool:
    try:
        _CLEAR.write_text(_RESET_PEAK)
    except OSError:
        return False
    return True
