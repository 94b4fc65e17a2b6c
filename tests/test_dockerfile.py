"""The image's pins: within what r1mega asks for, the same as those that tests run with, and to be had."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from r1mega.launch.doctor import requirements

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "Dockerfile").read_text()
PINS = dict(re.findall(r"^ARG ([A-Z_]+)=(\S+)$", TEXT, re.MULTILINE))
PACKAGES = {
    "MEGATRON_CORE": "megatron-core",
    "TRANSFORMERS": "transformers",
    "NEMO_RUN": "nemo-run",
    "LEPTONAI": "leptonai",
    "TRANSFORMER_ENGINE": "transformer-engine-torch",
    "SGLANG": "sglang",
}


@pytest.mark.parametrize("extra", ["", "cuda", "cluster"])
def test_pins_are_within_what_the_package_asks_for(extra: str) -> None:
    known = {name: PINS[pin] for pin, name in PACKAGES.items()} | {"transformer-engine": PINS["TRANSFORMER_ENGINE"]}
    pinned = [asked for asked in requirements(extra) if asked.name in known]
    assert len(pinned) == {"": 2, "cuda": 1, "cluster": 2}[extra]
    assert all(asked.specifier.contains(known[asked.name]) for asked in pinned)


def test_pins_are_those_that_tests_run_with() -> None:
    constraints = {
        line.partition("==")[0]: line.partition("==")[2].strip() for line in (ROOT / "tools/constraints-cpu.txt").read_text().splitlines()
    }
    assert PINS["TRANSFORMERS"] == constraints["transformers"]
    assert f"megatron-core=={PINS['MEGATRON_CORE']}" in (ROOT / "tools/test").read_text()
    installer = ROOT / "tools/install_sglang_cpu"
    assert not installer.exists() or f"sglang=={PINS['SGLANG']}" in installer.read_text()


def test_everything_is_pinned_and_nothing_runs_as_root() -> None:
    assert re.fullmatch(r"[0-9a-f]{40}", PINS["APEX"])
    assert PINS.keys() - {"BASE", "APEX"} == PACKAGES.keys()
    installed = re.findall(r"pip (?:install|wheel)(?:[^\n]*\\\n)*[^\n]*", TEXT)
    names = [name for command in installed for name in re.findall(r'"([a-z][a-z0-9-]+)==\$', command)]
    assert sorted(names) == sorted([*PACKAGES.values(), "transformer-engine", "transformer-engine-cu13"])
    assert re.findall(r"^USER (\S+)", TEXT, re.MULTILINE)[-1] not in ("0", "root")


@pytest.mark.proof
@pytest.mark.parametrize("pin", PACKAGES)
def test_every_pin_is_to_be_had(pin: str) -> None:
    """Asks the package index: pytest -m proof tests/test_dockerfile.py"""
    asked = Requirement(PACKAGES[pin])
    done = subprocess.run(
        [sys.executable, "-m", "pip", "index", "versions", "--ignore-requires-python", asked.name],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert PINS[pin] in re.split(r"[\s,]+", done.stdout), done.stderr
