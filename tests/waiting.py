"""Wait for what other processes do."""

import time


def wait_for(condition, seconds=60):
    """The condition's first true value; fails after so many seconds."""
    ends = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < ends, "waited too long"
        time.sleep(0.05)
    return value
