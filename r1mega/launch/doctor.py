"""`r1mega doctor`: what this machine has for a recipe, what each missing part costs, and the command that adds it.

Versions that work together are those that the package itself asks for; they are written down once, in pyproject.toml.
"""

import importlib.util
import json
import platform
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement

import r1mega
from r1mega import env
from r1mega.config.base import FunctionMark
from r1mega.config.loading import load_recipe
from r1mega.config.rollout import Sglang
from r1mega.config.schema import Recipe
from r1mega.config.stages import Evaluate, Rejection
from r1mega.config.tree import marked
from r1mega.errors import UserError
from r1mega.pipeline.node_health import sick_gpus
from r1mega.pipeline.preflight import check_contents, check_references
from r1mega.rewards.sandbox import find_sandbox

State = Literal["ok", "missing", "wrong"]
_CHECKOUT = Path(r1mega.__file__).parents[1]
_ASK_S = 120.0
_SLOW_GB_S = {"cpu": 0.05, "cuda": 20.0}
"""Below so many gigabytes a second of an all-reduce between two ranks of this machine, something is misconfigured: a loopback socket
reaches about 0.5, PCIe 4.0 about 20, NVLink of an H100 hundreds."""


@dataclass(frozen=True)
class Finding:
    """One part of a machine."""

    name: str
    state: State
    found: str
    """A version, or what is wrong."""
    needed: bool
    """Whether the recipe cannot run without."""
    costs: str = ""
    """What is lost without it."""
    fix: str = ""
    """The command that adds it."""


def examine(recipe_path: Path | None, overrides: Sequence[str], quick: bool) -> list[Finding]:
    """Look at everything; with a recipe, at whether it can run here. `quick` leaves out the two ranks that talk to each other."""
    recipe = load_recipe(recipe_path, overrides, inputs=False) if recipe_path else None
    cuda = recipe is not None and recipe.run.platform == "cuda"
    found = [_python(), *_core(), *_devices(recipe), _transformer_engine(cuda), _apex(), _deep_ep(recipe)]
    found += [_sglang(recipe), _nemo_run(), _resiliency(), _sandbox(recipe), _slurm(), _container()]
    if not quick and all(finding.state == "ok" for finding in found if finding.needed):
        found.append(_two_ranks("cuda" if cuda else "cpu"))
    if recipe_path is not None:
        found.append(_recipe(recipe_path, overrides))
    return found


def lines(found: Sequence[Finding]) -> list[str]:
    """A line for each part; below it, where it is not well, what that costs and what to do."""
    width, told = max(len(finding.name) for finding in found), []
    for finding in found:
        mark = "ok" if finding.state == "ok" else finding.state.upper() if finding.needed else finding.state
        told.append(f"{finding.name.ljust(width)}  {mark.ljust(7)}  {finding.found}".rstrip())
        if finding.state != "ok":
            told += [f"{'':{width}}           {text}" for text in (finding.costs, finding.fix) if text]
    return told


def able(found: Sequence[Finding]) -> bool:
    """Whether nothing that is needed is missing or wrong."""
    return all(finding.state == "ok" for finding in found if finding.needed)


# ------------------------------------------------------------ packages


def _python() -> Finding:
    version = platform.python_version()
    state: State = "ok" if sys.version_info >= (3, 11) else "wrong"
    return Finding("Python", state, version, True, "r1mega's syntax is that of 3.11", "install Python 3.11 or newer")


def requirements(extra: str = "") -> list[Requirement]:
    """What the package asks for: without an extra its core, with one what that adds."""
    try:
        texts = metadata.requires("r1mega") or []
    except metadata.PackageNotFoundError:
        project = tomllib.loads((_CHECKOUT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        texts = project["optional-dependencies"][extra] if extra else project["dependencies"]
        return [asked for asked in map(Requirement, texts) if asked.marker is None or asked.marker.evaluate()]
    parsed = [Requirement(text) for text in texts]
    core = [asked for asked in parsed if asked.marker is None or asked.marker.evaluate({"extra": ""})]
    if not extra:
        return core
    return [asked for asked in parsed if asked not in core and asked.marker is not None and asked.marker.evaluate({"extra": extra})]


def _installed(asked: Requirement) -> tuple[State, str]:
    try:
        version = metadata.version(asked.name)
    except metadata.PackageNotFoundError:
        return "missing", f"{asked.name} is not installed"
    if not asked.specifier.contains(version, prereleases=True):
        return "wrong", f"{version}; {asked.specifier} is needed"
    return "ok", version


def _core() -> Iterator[Finding]:
    """torch and megatron-core by name; of the others those that are not right."""
    for asked in requirements():
        state, found = _installed(asked)
        if state == "ok" and asked.name not in ("torch", "megatron-core", "transformers"):
            continue
        fix = f"pip install '{asked.name}{asked.specifier}'"
        yield Finding(asked.name, state, found, True, "a part of r1mega itself", fix)


def _devices(recipe: Recipe | None) -> Iterator[Finding]:
    """CUDA and NCCL, as torch sees them."""
    needed = recipe is not None and recipe.run.platform == "cuda"
    costs, fix = "runs on the CPU alone (run.platform=cpu)", "install a CUDA build of torch, on a machine with NVIDIA's driver"
    try:
        import torch
    except ImportError as error:
        yield Finding("CUDA", "missing", f"torch cannot be imported ({error})", needed, costs, fix)
        return
    if not torch.cuda.is_available():
        built = f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch is built without CUDA"
        yield Finding("CUDA", "missing", f"no device; {built}", needed, costs, fix)
        return
    names = sorted({torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())})
    yield Finding("CUDA", "ok", f"{torch.version.cuda}, {torch.cuda.device_count()} x {', '.join(names)}", needed)
    version = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
    yield Finding("NCCL", "ok", version, needed)


def _transformer_engine(needed: bool) -> Finding:
    asked = next(asked for asked in requirements("cuda") if asked.name == "transformer-engine")
    state, found = _installed(asked)
    return Finding(
        *("Transformer Engine", state, found, needed),
        *("no training on GPUs, no FP8", f"pip install --no-build-isolation '{asked.name}[pytorch]{asked.specifier}'"),
    )


def _apex() -> Finding:
    costs = "nothing: fused layers, optimizer and gradient accumulation are Transformer Engine's"
    fix = "build NVIDIA's from source, as the Dockerfile does; the `apex` of the package index is something else"
    # The kernel that Megatron-Core calls, from NVIDIA's Apex built with its CUDA extensions; no other package has it.
    if importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None:
        return Finding("Apex", "ok", "NVIDIA's, with fused weight gradients", False)
    if importlib.util.find_spec("apex") is None:
        return Finding("Apex", "missing", "", False, costs, fix)
    nvidia = importlib.util.find_spec("amp_C") is not None
    found = "NVIDIA's, without --fused-weight-gradient" if nvidia else "a package `apex` that is not NVIDIA's"
    return Finding("Apex", "wrong", found, False, costs, fix)


def _deep_ep(recipe: Recipe | None) -> Finding:
    stages = () if recipe is None else recipe.stages.values()
    asked = any(not isinstance(stage, Rejection | Evaluate) and stage.train.dispatcher == "deepep" for stage in stages)
    there = importlib.util.find_spec("deep_ep") is not None
    costs = "no train.dispatcher=deepep: experts on other nodes are reached by NCCL's all-to-all, which is slower"
    fix = "pip install --no-build-isolation git+https://github.com/deepseek-ai/DeepEP"
    return Finding("DeepEP", "ok" if there else "missing", "", asked, costs, fix)


def _sglang(recipe: Recipe | None) -> Finding:
    """In its own environment, whose torch and transformers are not the trainer's."""
    needed = recipe is not None and recipe.rollout.engine == "sglang"
    settings = recipe.rollout.sglang if recipe else Sglang()
    costs, fix = (
        "the embedded engine answers (rollout.engine=local): right, and slow",
        "tools/install_sglang_cpu, or the image's second environment",
    )
    from r1mega.rollout.sglang_servers import interpreter

    if settings.addresses:
        return Finding("SGLang", "ok", f"servers at {', '.join(settings.addresses)}, asked when their stage begins", needed)
    try:
        python = interpreter(settings)
    except UserError as error:
        return Finding("SGLang", "missing", str(error), needed, costs, fix)
    ask = "from importlib.metadata import version as v; print(v('sglang'), 'with torch', v('torch'), 'and transformers', v('transformers'))"
    code, said = _said([str(python), "-c", ask])
    return Finding("SGLang", "wrong" if code else "ok", said, needed, costs, fix)


def _nemo_run() -> Finding:
    asked = requirements("cluster")
    wrong = [(one, *_installed(one)) for one in asked if _installed(one)[0] != "ok"]
    fix = "./tools/install cluster, or pip install 'r1mega[cluster]'"
    costs = "no r1mega submit; r1mega run and the scripts of others work"
    if wrong:
        return Finding("NeMo-Run", wrong[0][1], f"{wrong[0][0].name}: {wrong[0][2]}", False, costs, fix)
    return Finding("NeMo-Run", "ok", metadata.version("nemo-run"), False)


_RESILIENCY = "pip install --no-deps nvidia-resiliency-ext nvidia-ml-py defusedxml"
"""Not with its dependency pynvml, at which torch warns in every process: nvidia-ml-py brings that module too."""


def _resiliency() -> Finding:
    # Megatron-Core from 0.19 on uses it wherever it is installed, and fails with older releases.
    newer = _installed(Requirement("megatron-core>=0.19"))[0] == "ok"
    state, found = _installed(Requirement(f"nvidia-resiliency-ext>={'0.6' if newer else '0.4'}"))
    sick = sick_gpus() if state == "ok" else ""
    costs = "megatron-core cannot be imported" if state == "wrong" else "GPUs that must be reset are not told before ranks start on them"
    fix = "drain this node and reset them" if sick else "pip uninstall nvidia-resiliency-ext" if state == "wrong" else _RESILIENCY
    return Finding("resiliency", "wrong" if sick else state, sick or found, state == "wrong" or bool(sick), costs, fix)


# ------------------------------------------------------------ the system


def _sandbox(recipe: Recipe | None) -> Finding:
    needed = recipe is not None and any(value.startswith("r1mega.rewards.code:") for _, _, value in marked(recipe, FunctionMark))
    try:
        find_sandbox()
    except UserError as error:
        missing: State = "missing" if shutil.which("bwrap") is None else "wrong"
        return Finding("bubblewrap", missing, str(error), needed, "no rewards for code", "apt-get install bubblewrap")
    return Finding("bubblewrap", "ok", _said(["bwrap", "--version"])[1], needed)


def _slurm() -> Finding:
    costs = "jobs are submitted elsewhere; --dry-run writes their scripts"
    if shutil.which("sbatch") is None:
        return Finding("Slurm", "missing", "no sbatch", False, costs, "submit from a login node")
    code, said = _said(["sbatch", "--version"])
    pyxis = "with pyxis" if "--container-image" in _said(["srun", "--help"], whole=True)[1] else "without pyxis"
    return Finding("Slurm", "wrong" if code else "ok", f"{said}, {pyxis}", False, costs, "see sbatch --version")


def _container() -> Finding:
    inside = [name for name, path in (("Docker", "/.dockerenv"), ("Podman", "/run/.containerenv")) if Path(path).exists()]
    tools = [name for name in ("enroot", "docker", "podman", "apptainer") if shutil.which(name)]
    if inside:
        return Finding("container", "ok", f"inside {inside[0]}", False)
    costs, fix = "stages run in the environments of the nodes", "see the Dockerfile and docs/cluster.md"
    return Finding("container", "ok" if tools else "missing", ", ".join(tools), False, costs, fix)


def _said(command: Sequence[str], whole: bool = False) -> tuple[int, str]:
    """Exit code and last line, or all, of what a command says."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_ASK_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        return 1, str(error)
    text = (done.stdout + done.stderr).strip()
    return done.returncode, text if whole else text.splitlines()[-1] if text else ""


# ------------------------------------------------------------ trying it


def _two_ranks(platform_name: str) -> Finding:
    """Two ranks that meet, reduce and time a link."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    try:
        done = subprocess.run(
            [*command, "-m", "r1mega.launch.smoke", platform_name],
            env=env.for_ranks(1, platform_name) | {"PYTHONPATH": env.python_path([_CHECKOUT])},
            capture_output=True,
            text=True,
            timeout=_ASK_S,
        )
    except subprocess.TimeoutExpired:
        return Finding("two ranks", "wrong", f"did not meet in {_ASK_S:g} s", True, "no run of several ranks", "see NCCL_DEBUG=INFO")
    reports = re.findall(r"^\{.*\}$", done.stdout, re.MULTILINE)
    if done.returncode or not reports:
        why = next((line for line in reversed(done.stderr.splitlines()) if "Error" in line), f"exit code {done.returncode}")
        return Finding("two ranks", "wrong", why.strip()[:200], True, "no run of several ranks", "NCCL_DEBUG=INFO r1mega doctor")
    rate = float(json.loads(reports[0])["gb_per_s"])
    slow = rate < _SLOW_GB_S[platform_name]
    found = f"all-reduce of 64 MB at {rate:.2f} GB/s"
    return Finding("two ranks", "wrong" if slow else "ok", found, False, "slow steps", "look at `nvidia-smi topo -m` and NCCL_DEBUG=INFO")


def _recipe(path: Path, overrides: Sequence[str]) -> Finding:
    """Everything that `r1mega run` checks before it starts ranks."""
    checks: list[Callable[[Recipe], object]] = [lambda recipe: check_references(recipe, path.parent.absolute()), check_contents]
    try:
        recipe = load_recipe(path, overrides)
        for check in checks:
            check(recipe)
    except UserError as error:
        return Finding("recipe", "wrong", str(error), True)
    return Finding("recipe", "ok", f"{recipe.name} can run on {recipe.run.ranks} ranks ({recipe.run.platform})", True)
