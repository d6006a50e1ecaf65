"""Free memory goes back to the system."""

import threading

import psutil
import torch

from fedllm.allocator import give_back_memory

MIB = 1 << 20


def test_what_threads_have_freed_is_given_back():
    def work():
        # Pieces below the size at which glibc maps memory on its own, with some that stay in between.
        pieces = [torch.ones(MIB // 8) for _ in range(400)]
        kept.append(pieces[::40])

    kept = []
    for _ in range(3):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    process = psutil.Process()
    before = process.memory_info().rss
    give_back_memory()
    assert before - process.memory_info().rss > 200 * MIB
    assert len(kept) == 3
