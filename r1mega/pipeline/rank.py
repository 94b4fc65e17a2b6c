"""What torchrun starts on every rank: `python -m r1mega.pipeline.rank MODULE ARGUMENTS`. It runs the module as a program.

A module's imports take seconds. Whoever ends torchrun in these must not leave ranks behind that nobody knows of.
"""

import os
import runpy
import sys

from r1mega.process import die_with_parent

if __name__ == "__main__":
    die_with_parent()
    # Torchrun, which is never the first process of a machine, may have died before that.
    if os.getppid() == 1:
        raise SystemExit("torchrun is gone")
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
