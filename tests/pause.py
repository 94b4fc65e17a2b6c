"""A measure that takes its time, for tests that need a run to last."""

import os
import time


def pause(prompt: object, response: str) -> float:
    time.sleep(float(os.environ.get("R1MEGA_TEST_PAUSE", "0.05")))
    return 0.0
