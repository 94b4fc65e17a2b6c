"""The checks: what is asked of which platform, and what the answers must agree on."""

import itertools
import json
import math
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file
from torch import Tensor

import r1mega
from r1mega import env
from r1mega.gpu_check.models import FAMILIES, WARMUP, Kind
from r1mega.gpu_check.report import Row, bounded

Device = Literal["cuda", "cpu"]
FP8 = ("blockwise", "tensorwise", "mxfp8")
KINDS: tuple[Kind, ...] = ("dense", "MoE")

PARITY = 1e-4
"""Of a norm, between two float32 platforms: a hundred times what sums in another order make, and a fifth of what TF32 would."""
ROUNDING = 2.0
"""Transformer Engine's distance to float32 over that of plain kernels in the same bfloat16: the same arithmetic, rounded elsewhere."""
LOSS_GAP = 0.0025
"""FP8 against bf16, relative, of smoothed losses: DeepSeek-V3's own figure (arXiv 2412.19437, section 3.3 and appendix B.1)."""
EXACT, ACTIVATIONS = 0.05, 0.15
"""Planner against measured bytes: where it is arithmetic, and where it counts what kernels keep."""
_KEPT = 0.9
"""Of the smoothed loss at every step, as in DeepSeek-V3's figure 10."""
_PATIENCE_S = 600.0
_ROOT = Path(r1mega.__file__).parents[1]


class Skipped(Exception):
    """What this machine lacks for a case."""


@dataclass(frozen=True)
class Answer:
    """What a worker measured."""

    scalars: dict[str, Any]
    tensors: dict[str, Tensor]


@dataclass
class Bench:
    """Asks workers, each question once."""

    device: Device
    threads: int = 1
    patience_s: float = _PATIENCE_S
    _answers: dict[str, Answer] = field(default_factory=dict)

    def ask(self, platform: str, measure: str, train: Mapping[str, Any], **arguments: Any) -> Answer:
        """An answer of a process of its own.

        Raises:
            Skipped: the platform, or the answer, says what is missing.
            RuntimeError: the process failed, or took too long.
        """
        asked = json.dumps({"train": dict(train), **arguments})
        key = f"{platform} {measure} {asked}"
        if key not in self._answers:
            self._answers[key] = self._ask(platform, measure, asked)
        answer = self._answers[key]
        if "lacks" in answer.scalars:
            raise Skipped(answer.scalars["lacks"])
        return answer

    def _ask(self, platform: str, measure: str, asked: str) -> Answer:
        with tempfile.TemporaryDirectory(prefix="gpu_check-") as name:
            folder = Path(name)
            command = [sys.executable, "-m", "r1mega.gpu_check.worker", platform, measure, asked, name, str(self.threads)]
            try:
                done = subprocess.run(
                    command,
                    env=env.for_ranks(self.threads, "cpu" if platform == "cpu" else "cuda") | {"PYTHONPATH": env.python_path([_ROOT])},
                    capture_output=True,
                    text=True,
                    timeout=self.patience_s,
                )
            except subprocess.TimeoutExpired:
                raise RuntimeError(f"did not end in {self.patience_s:g} s") from None
            if done.returncode:
                raise RuntimeError(_last_line(done.stderr) or f"ended with {done.returncode}")
            tensors = folder / "tensors.safetensors"
            scalars = json.loads((folder / "measured.json").read_text(encoding="utf-8"))
            return Answer(scalars, load_file(tensors) if tensors.exists() else {})


def _last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")[:300]


Case = tuple[str, Callable[[], Iterable[Row]]]
"""A name, and what gives its rows."""


def run(bench: Bench, names: Sequence[str], tell: Callable[[Row], None]) -> list[Row]:
    """Every case of the named checks; one that fails, or cannot run here, is a row and hides none of the others."""
    found: list[Row] = []
    for name in names:
        for case, measure in CHECKS[name](bench):
            try:
                rows = list(measure())
            except Skipped as lack:
                rows = [Row(name, case, "skipped", note=str(lack))]
            except Exception as error:  # noqa: BLE001 - kernels and libraries of another machine: whatever they raise is a finding
                rows = [Row(name, case, "failed", note=f"{type(error).__name__}: {error}")]
            found += rows
            for row in rows:
                tell(row)
    return found


def _cuda_only(bench: Bench, why: str) -> None:
    if bench.device != "cuda":
        raise Skipped(f"{why}; --device cpu has none")


# ------------------------------------------------------------ tests


def tests(bench: Bench) -> Iterator[Case]:
    """The tests that are marked `gpu`."""

    def measure() -> Iterator[Row]:
        _cuda_only(bench, "the tests marked gpu need a GPU")
        with tempfile.TemporaryDirectory(prefix="gpu_check-") as name:
            path = Path(name) / "junit.xml"
            command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", f"--junitxml={path}", "tests"]
            ranks = env.for_ranks(bench.threads, "cuda")
            done = subprocess.run(command, cwd=_ROOT, env=ranks, timeout=bench.patience_s, capture_output=True, text=True)
            if not path.exists():
                raise RuntimeError(_last_line(done.stdout + done.stderr))
            yield from of_tests(path)

    yield "pytest -m gpu", measure


def of_tests(path: Path) -> Iterator[Row]:
    """A row for each test of a JUnit file."""
    for case in ElementTree.parse(path).getroot().iter("testcase"):
        name = case.get("name", "")
        wrong, skipped = case.find("failure"), case.find("skipped")
        wrong = case.find("error") if wrong is None else wrong
        if wrong is not None:
            yield Row("tests", name, "failed", note=_last_line(wrong.get("message", "")))
        elif skipped is not None:
            yield Row("tests", name, "skipped", note=skipped.get("message", ""))
        else:
            yield Row("tests", name, "passed", float(case.get("time", "nan")), "s")


# ------------------------------------------------------------ parity


def parity(bench: Bench) -> Iterator[Case]:
    """A GPU's float32 against a CPU's, through the same layers. With --device cpu against the same one with activations recomputed."""
    train, asked = {"dtype": "float32", "chunk_tokens": 1024}, {"families": list(FAMILIES), "routed": False}
    other, again = ("cuda_local", train) if bench.device == "cuda" else ("cpu", train | {"recompute": "full"})

    def measure(family: str) -> Iterator[Row]:
        yield from compared(family, bench.ask("cpu", "outputs", train, **asked), bench.ask(other, "outputs", again, **asked))

    for family in FAMILIES:
        yield family, partial(measure, family)


def compared(family: str, expected: Answer, found: Answer) -> Iterator[Row]:
    """Loss, logits and the worst gradient of one family, relative to the norm of what is expected."""
    loss, wanted = _scalar(found, family), _scalar(expected, family)
    yield bounded("parity", f"{family}: loss", abs(loss / wanted - 1), PARITY, note=f"{wanted:.6f}")
    errors = {name: _distance(found.tensors[name], value) for name, value in _of(expected, family).items()}
    yield bounded("parity", f"{family}: logits", errors.pop(f"{family}/logits"), PARITY)
    worst = max(errors, key=lambda name: errors[name] if math.isfinite(errors[name]) else math.inf)
    yield bounded("parity", f"{family}: gradients", errors[worst], PARITY, note=f"worst of {len(errors)}: {worst.split('/')[-1]}")


def _scalar(answer: Answer, family: str) -> float:
    if "error" in answer.scalars[family]:
        raise RuntimeError(answer.scalars[family]["error"])
    return float(answer.scalars[family]["loss"])


def _of(answer: Answer, family: str) -> dict[str, Tensor]:
    return {name: value for name, value in answer.tensors.items() if name.startswith(f"{family}/")}


def _distance(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what is expected; of what is 0 everywhere, the norm of the difference itself."""
    norm = expected.double().norm().item()
    return (found.double() - expected.double()).norm().item() / (norm or 1.0)


# ------------------------------------------------------------ Transformer Engine


def layers(bench: Bench) -> Iterator[Case]:
    """Transformer Engine's layers in bf16 against plain ones in bf16: how far each is from float32 on a CPU, experts given."""
    asked = {"families": list(FAMILIES), "routed": True}
    short, wide = ({"dtype": dtype, "chunk_tokens": 1024} for dtype in ("bfloat16", "float32"))

    def measure(family: str) -> Iterator[Row]:
        _cuda_only(bench, "Transformer Engine needs a GPU")
        fused = bench.ask("cuda", "outputs", short, **asked)
        yield from rounded(family, bench.ask("cpu", "outputs", wide, **asked), bench.ask("cuda_local", "outputs", short, **asked), fused)

    for family in FAMILIES:
        yield family, partial(measure, family)


def rounded(family: str, exact: Answer, plain: Answer, fused: Answer) -> Iterator[Row]:
    """How far two platforms in bf16 are from float32, the second over the first: of logits, and of all gradients together."""
    for answer in (exact, plain, fused):
        _scalar(answer, family)
    for part, name in (("logits", "logits"), ("gradients/", "gradients")):
        wanted = {key: value for key, value in _of(exact, family).items() if key.startswith(f"{family}/{part}")}
        whole, *others = (torch.cat([answer.tensors[key].flatten().double() for key in wanted]) for answer in (exact, plain, fused))
        ours, theirs = (_distance(other, whole) for other in others)
        yield bounded("layers", f"{family}: {name}", theirs / ours, ROUNDING, note=f"{theirs:.2%} of the norm, plain kernels {ours:.2%}")


# ------------------------------------------------------------ FP8


def loss(bench: Bench) -> Iterator[Case]:
    """Short runs under every FP8 recipe against one in bf16, from weights that have settled. On a CPU, bf16 against float32."""
    base = {"dtype": "float32"} if bench.device == "cpu" else {"dtype": "bfloat16"}
    others = {"bfloat16": {"dtype": "bfloat16"}} if bench.device == "cpu" else {recipe: base | {"fp8": recipe} for recipe in FP8}
    for name, other in others.items():
        case = f"{name} against {base['dtype']}"
        yield case, partial(gap, bench, case, base, other)


def gap(bench: Bench, case: str, base: Mapping[str, Any], other: Mapping[str, Any]) -> list[Row]:
    """The largest relative gap between two smoothed curves after the warm-up."""
    found = bench.ask(bench.device, "curve", other, base=dict(base), device=bench.device).scalars
    value, step = largest_gap(found["base"], found["losses"], WARMUP)
    note = f"at step {step + 1} of {len(found['base'])}; the loss goes from {found['base'][0]:.3f} to {found['base'][-1]:.3f}"
    return [bounded("loss", case, value, LOSS_GAP, note=note)]


def largest_gap(expected: Sequence[float], found: Sequence[float], warmup: int) -> tuple[float, int]:
    """(the largest |b / a - 1| of exponential moving averages from step `warmup` on, its step). NaN wherever one is."""
    a, b = expected[0], found[0]
    worst, place = 0.0, warmup
    for step, (x, y) in enumerate(zip(expected, found, strict=True)):
        a, b = _KEPT * a + (1 - _KEPT) * x, _KEPT * b + (1 - _KEPT) * y
        value = abs(b / a - 1)
        if step >= warmup and not value <= worst:
            worst, place = value, step
            if math.isnan(value):
                break
    return worst, place


# ------------------------------------------------------------ layers of DeepSeek-V3


def _precisions(bench: Bench) -> list[tuple[str, dict[str, str]]]:
    if bench.device == "cpu":
        return [("float32", {})]
    return [("bfloat16", {"dtype": "bfloat16"}), *((recipe, {"dtype": "bfloat16", "fp8": recipe}) for recipe in FP8)]


def _slices(bench: Bench, rows: Callable[[str, Mapping[str, Any]], Iterable[Row]]) -> Iterator[Case]:
    """A case for each kind of layer in each precision; `rows` of what was measured. Both checks read the same measurement."""

    def measure(case: str, kind: Kind, train: dict[str, str]) -> Iterable[Row]:
        return rows(case, bench.ask(bench.device, "layer", train, kind=kind, device=bench.device).scalars)

    short = {"dtype": "bfloat16"}
    precisions: dict[str, dict[str, str]] = {"bfloat16": short, **{recipe: short | {"fp8": recipe} for recipe in FP8}}
    if bench.device == "cpu":
        precisions = {"float32": {}}
    for kind, (precision, train) in itertools.product(KINDS, precisions.items()):
        case = f"{kind} layer, {precision}"
        yield case, partial(measure, case, kind, train)


def throughput(bench: Bench) -> Iterator[Case]:
    """TFLOP/s of a layer's forward and backward pass, and what part that is of large products of the same dtype on this device."""
    return _slices(bench, reached)


def reached(case: str, found: Mapping[str, Any]) -> Iterator[Row]:
    """Two rows: the rate, and its part of that of products."""
    rate, products = found["flops"] / found["seconds"], found["gemm"]
    yield Row("throughput", case, "measured", rate / 1e12, "TFLOP/s", note=f"{found['seconds'] * 1e3:.1f} ms a pass")
    yield Row("throughput", f"{case}: of products", "measured", rate / products, note=f"products reach {products / 1e12:.4g} TFLOP/s")


def memory(bench: Bench) -> Iterator[Case]:
    """What the planner says of the same layers' memory, by part; on a GPU the allocator's peak over a step as well."""
    return _slices(bench, planned)


def planned(case: str, found: Mapping[str, Any]) -> Iterator[Row]:
    """Relative errors of the planner."""
    for part, nbytes in found["held"].items():
        if part == "activations" and found["fp8"] != "none":
            # The weights' FP8 copies are among what autograd saves; only the peak can be compared.
            note = f"planned {found['planned'][part] / 1e6:,.1f} MB without the weights' FP8 copies, which are in this"
            yield Row("memory", f"{case}: activations", "measured", nbytes / 1e6, "MB", note=note)
            continue
        yield _error(case, part, found["planned"][part], nbytes, ACTIVATIONS if part == "activations" else EXACT)
    if "peak" in found:
        # What CUDA and NCCL hold is not the allocator's.
        said = sum(size for part, size in found["planned"].items() if part != "runtime")
        yield _error(case, "peak", said, found["peak"], ACTIVATIONS)


def _error(case: str, part: str, said: float, nbytes: float, bound: float) -> Row:
    note = f"planned {said / 1e6:,.1f} MB, measured {nbytes / 1e6:,.1f} MB"
    return bounded("memory", f"{case}: {part}", abs(said / nbytes - 1), bound, note=note)


CHECKS: Mapping[str, Callable[[Bench], Iterator[Case]]] = {
    "tests": tests, "parity": parity, "layers": layers, "loss": loss, "throughput": throughput, "memory": memory,
}  # fmt: skip
"""By name, in the order in which they run."""
