"""What a process asks of its operating system."""

import ctypes
import signal
import sys

_PR_SET_PDEATHSIG = 1


def die_with_parent(sign: signal.Signals = signal.SIGKILL) -> None:
    """Ask Linux to send this process a signal when its parent dies, however it dies, even if it is stuck in native code by then.

    No orphan keeps a core busy or writes to a run directory. The parent is the thread that started this process, so a process is
    started from a thread that lives as long as it should.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(sign))
