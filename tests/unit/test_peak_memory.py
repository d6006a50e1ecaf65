"""The peak of one job, not that of the jobs before it."""

import torch

from fedllm import peak_memory
from fedllm.peak_memory import PeakMemory

CPU = torch.device("cpu")
SIZE = 200 << 20


def test_the_peak_falls_back_when_a_new_job_begins():
    first = PeakMemory(CPU)
    before = first.bytes
    block = torch.ones(SIZE, dtype=torch.uint8)
    del block
    assert first.bytes - before > 0.9 * SIZE
    second = PeakMemory(CPU)
    assert (
        first.bytes - second.bytes < 0.1 * SIZE
    )  # the kernel has one count for the process, and it was reset
    assert second.bytes - before < 0.1 * SIZE


def test_where_the_kernel_cannot_start_anew_it_is_the_peak_of_the_process(monkeypatch, tmp_path):
    monkeypatch.setattr(peak_memory, "_CLEAR", tmp_path / "missing" / "file")
    block = torch.ones(SIZE, dtype=torch.uint8)
    del block
    assert PeakMemory(CPU).bytes > SIZE
