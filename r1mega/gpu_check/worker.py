"""One measurement in a process of its own: `python -m r1mega.gpu_check.worker PLATFORM MEASURE ARGUMENTS FOLDER`, which `checks` starts.

`ARGUMENTS` is a JSON object, `train` among it. Leaves `measured.json` in the folder, and `tensors.safetensors` where there are tensors.
"""

import json
import sys
import warnings
from pathlib import Path
from typing import Any

from r1mega.process import die_with_parent


def main(name: str, measure: str, arguments: dict[str, Any], folder: Path, threads: int) -> None:
    """Start the platform, measure, write. What this machine lacks for it is an answer: `lacks`."""
    die_with_parent()
    warnings.simplefilter("ignore")
    from safetensors.torch import save_file

    from r1mega.config.training import Train
    from r1mega.errors import UserError
    from r1mega.megatron import platform
    from r1mega.pipeline.files import write_json

    train = Train(**arguments.pop("train"))
    try:
        platform.start(name, threads)
        if name == "cuda":
            from r1mega.megatron.platform import cuda

            cuda.check(train)
    except UserError as error:
        write_json(folder / "measured.json", {"lacks": str(error)})
        return
    from r1mega.gpu_check.measures import MEASURES

    found = MEASURES[measure](train, **arguments)
    if found.tensors:
        save_file(found.tensors, folder / "tensors.safetensors")
    write_json(folder / "measured.json", found.scalars)
    platform.stop()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), Path(sys.argv[4]), int(sys.argv[5]))
