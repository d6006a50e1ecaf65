"""Free memory goes back to the system."""

import threading

import psutil
import torch

from fedllm.allocator import give_back_memory

MIB = 1 << 20


def resident() -> int:
    return psutil.Process().memory_info().rss


def test_what_threads_have_freed_is_given_back():
    def work():
        # Pieces below the size at which glibc maps memory on its own, with some that stay in between.
        pieces = [torch.ones(MIB // 8) for _ in range(400)]
        kept.append(pieces[::40])

    kept = []
    give_back_memory()
    start = resident()
    for _ in range(3):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    grown = resident() - start  # 200 MiB a thread at most: a later one may use what an earlier one has freed
    give_back_memory()
    in_use = sum(piece.nbytes for pieces in kept for piece in pieces)
    assert grown > in_use + 100 * MIB
    assert resident() - start < in_use + (grown - in_use) / 4
