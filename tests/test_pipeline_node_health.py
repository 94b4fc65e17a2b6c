"""GPUs that the driver wants reset, as nvidia-resiliency-ext reads them from a driver that is made up."""

import sys
from pathlib import Path
from types import ModuleType

import pytest
import test_pipeline_stage
from test_pipeline_run import finish
from test_pipeline_stage import outcomes, recipe  # noqa: F401 - a fixture

from r1mega.pipeline.hangs import HUNG
from r1mega.pipeline.node_health import sick_gpus
from r1mega.pipeline.nodes import attempts

pytestmark = pytest.mark.slow
DRIVER = """
class NVMLError(Exception):
    pass
def nvmlInit(): pass
def nvmlShutdown(): pass
def nvmlSystemGetDriverVersion(): return "{version}"
def nvmlDeviceGetCount(): return 2
def nvmlDeviceGetHandleByIndex(index): return index
NVML_FI_DEV_GET_GPU_RECOVERY_ACTION = 0
NVML_GPU_RECOVERY_ACTION_NONE, NVML_GPU_RECOVERY_ACTION_GPU_RESET, NVML_GPU_RECOVERY_ACTION_NODE_REBOOT = 0, 1, 2
NVML_GPU_RECOVERY_ACTION_DRAIN_P2P, NVML_GPU_RECOVERY_ACTION_DRAIN_AND_RESET = 3, 4
def nvmlDeviceGetFieldValues(handle, fields):
    from types import SimpleNamespace
    return [SimpleNamespace(value=SimpleNamespace(uiVal=[0, {action}][handle]))]
"""


@pytest.fixture(autouse=True)
def _installed() -> None:
    pytest.importorskip("nvidia_resiliency_ext")


def with_driver(monkeypatch: pytest.MonkeyPatch, version: str, action: int) -> None:
    made_up = ModuleType("pynvml")
    exec(DRIVER.format(version=version, action=action), made_up.__dict__)
    monkeypatch.setitem(sys.modules, "pynvml", made_up)


@pytest.mark.parametrize(("version", "action", "said"), [("575.51", 0, ""), ("550.90", 1, ""), ("575.51", 1, "GPU 1: Requires a reset")])
def test_what_the_driver_says_of_its_gpus(monkeypatch: pytest.MonkeyPatch, version: str, action: int, said: str) -> None:
    with_driver(monkeypatch, version, action)
    assert bool(sick_gpus()) == bool(said) and said in sick_gpus() and "\n" not in sick_gpus()


def test_without_a_driver_nothing_is_said_against_any_gpu() -> None:
    assert sick_gpus() == ""


def test_without_the_package_nothing_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nvidia_resiliency_ext.shared_utils.health_check", None)
    assert sick_gpus() == ""


def test_nothing_starts_on_a_node_with_a_gpu_that_must_be_reset(recipe: Path) -> None:  # noqa: F811
    (recipe.parent / "pynvml.py").write_text(DRIVER.format(version="575.51", action=1))
    run = recipe.parent / "run"
    code, _, err = finish(test_pipeline_stage.start(recipe, "zero", "run.platform=cuda", slurm=(0, 2, 0), modules=recipe.parent))
    assert code == HUNG and "GPU 1: Requires a reset" in err and "drain the node" in err and err.count("\n") == 1
    assert outcomes(run) == ["failed"]
    ((logs, attempt),) = attempts(run / "logs", "zero")
    assert "GPU 1: Requires a reset" in attempt.reason and not list(logs.glob("torchrun*"))
