"""Build Megatron's own GPTModel for chosen ranks of a world that does not exist, and print how the weight tables differ from it.

Run as a program with a JSON list of cases on standard input: {"config": .., "layout": .., "world": .., "ranks": [..]}.
Prints one list per case, with the differences of each rank, or the text of the error that was raised.
A process of its own, because the CPU platform's stand-ins change torch for the rest of the process.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent


def start(cases: Sequence[dict[str, Any]]) -> "subprocess.Popen[str]":
    """Start this program on some cases."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"}
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.megatron_shapes"], cwd=ROOT, env=env, stdin=pipe, stdout=pipe, stderr=pipe, text=True
    )
    assert process.stdin is not None
    process.stdin.write(json.dumps(cases))
    process.stdin.close()
    process.stdin = None  # or `communicate` would write to it again
    return process


def finish(process: "subprocess.Popen[str]", timeout: float = 600) -> list[list[list[str]] | str]:
    """What a started program found, case by case."""
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        process.kill()
    assert process.returncode == 0, err[-2000:]
    return json.loads(out.splitlines()[-1])


def main() -> None:
    from r1mega.config.layout import Layout
    from r1mega.megatron import shapes
    from r1mega.weights.architecture import Architecture
    from r1mega.weights.placement import placement

    results: list[list[list[str]] | str] = []
    for case in json.load(sys.stdin):
        arch, layout, world = Architecture.from_hf(case["config"]), Layout(**case["layout"]), case["world"]
        try:
            results.append(
                [
                    shapes.differences(
                        placement(arch, layout, world, rank, shapes.spelling()), shapes.build_rank(arch, layout, world, rank)
                    )
                    for rank in case["ranks"]
                ]
            )
        except Exception as error:  # one case's failure must not hide the others' results
            results.append(repr(error))
    print(json.dumps(results))


if __name__ == "__main__":
    main()
