"""A real SGLang server for tests, and what its answers are compared with."""

import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from r1mega.config.engine_layout import EngineLayout
from r1mega.config.rollout import Rollout, Sglang
from r1mega.errors import UserError
from r1mega.pipeline.model_folder import ModelFolder
from r1mega.rollout import sglang_routing
from r1mega.rollout.engine import Engine, Request, Sample, SamplingParams
from r1mega.rollout.open import Surroundings
from r1mega.rollout.sglang import SglangEngine
from r1mega.rollout.sglang_network import LOADER
from r1mega.rollout.sglang_servers import Started, interpreter
from r1mega.weights.canonical import canonical
from r1mega.weights.source import Mapped

ROOT = Path(__file__).parents[1]
KEY = "R1MEGA_TEST_KEY"
MODELS = {"deepseek": ROOT / "configs/tiny/base", "llama": ROOT / "configs/tiny/student"}


def require() -> None:
    """Skip where there is no environment with SGLang."""
    try:
        interpreter(Sglang())
    except UserError as error:
        pytest.skip(str(error))


def standin(folder: Path) -> Path:
    """What a recipe may name as `rollout.sglang.python`, which starts standin_server.py in the place of servers."""
    python = folder / "python"
    # Asked whether it has SGLang (`-c`), it has.
    python.write_text(f'#!/bin/sh\n[ "$1" = -c ] || exec {sys.executable} {Path(__file__).with_name("standin_server.py")} "$@"\n')
    python.chmod(0o755)
    return python


@contextmanager
def served(model: Path, folder: Path, dtype: str = "float32", tp: int = 1) -> Iterator[Started]:
    """A server of its own process group, ready."""
    require()
    told = ["--custom-weight-loader", LOADER, *([sglang_routing.FLAG] if ModelFolder(model).arch.moe else [])]
    wanted = Sglang(start_timeout_s=900, arguments=told, layout=EngineLayout(tp=tp))
    server = Started(wanted, model, dtype, Surroundings("cpu", folder), 0)
    try:
        while not server.ready():
            pass
        yield server
    finally:
        server.stop()


KEEPER = """
import sys, time
from pathlib import Path
from r1mega.rollout.sglang_keeper import LOOK_S, Keeper
with Keeper(Path(sys.argv[1]), int(sys.argv[2])) as keeper:
    while True:
        keeper.look()
        time.sleep(LOOK_S)
"""


@contextmanager
def keepers(folder: Path, nodes: Sequence[int]) -> Iterator[list[subprocess.Popen[bytes]]]:
    """What the tasks of these nodes do for servers, all on this machine."""
    found = [subprocess.Popen([sys.executable, "-c", KEEPER, str(folder), str(node)]) for node in nodes]
    try:
        yield found
    finally:
        for keeper in found:
            keeper.kill()
            keeper.wait()


def settings(server: Started, **changes: object) -> Rollout:
    """An engine that joins the server; its key is in the variable `KEY`."""
    joined = {"addresses": [server.client.address], "key_variable": KEY, "request_timeout_s": 300.0, "retries": 1}
    return Rollout(engine="sglang", sglang=Sglang(**{**joined, **changes}))


@contextmanager
def engine(server: Started, model: Path, folder: Path, **changes: object) -> Iterator[SglangEngine]:
    """The engine over one server, closed in the end."""
    built = SglangEngine(settings(server, **changes), model, Surroundings("cpu", folder))
    try:
        yield built
    finally:
        built.close()


def weights(model: Path, seed: int) -> dict[str, Tensor]:
    """Random weights of a model, peaked enough for varied distributions; nothing is left at 0 or 1, where a lost term would not show."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for tensor in canonical(ModelFolder(model).arch):
        if tensor.copy_of is None:
            noise = torch.randn(tensor.shape, generator=generator)
            found[tensor.name] = 1 + 0.1 * noise if tensor.name.endswith("norm.weight") else 0.1 * noise
    return found


def source(model: Path, seed: int) -> Mapped:
    """The same as a source."""
    return Mapped(ModelFolder(model).arch, weights(model, seed))


def reference(model: Path, seed: int, folder: Path) -> torch.nn.Module:
    """`transformers`' own model with those weights."""
    ModelFolder(model).write(folder, weights(model, seed), torch.float32)
    built = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager")
    return built.eval().requires_grad_(False)


def logprobs(model: torch.nn.Module, sample: Sample, temperature: float) -> Tensor:
    """Of the drawn tokens, from one forward pass: the tempered, full softmax, as the trainer has it; greedy counts as 1."""
    ids = torch.tensor([sample.prompt_ids + sample.response_ids])
    logits = model(input_ids=ids, use_cache=False).logits[0, len(sample.prompt_ids) - 1 : -1].float() / (temperature or 1.0)
    return logits.log_softmax(-1).gather(1, torch.tensor(sample.response_ids)[:, None])[:, 0]


def gap(model: torch.nn.Module, samples: list[Sample], sampling: SamplingParams) -> float:
    """The largest difference of log-probs."""
    return max(float((logprobs(model, one, sampling.temperature) - torch.tensor(one.logprobs)).abs().max()) for one in samples)


def requests(count: int = 12, longest: int = 20, new: int = 16) -> list[Request]:
    """Ragged prompts with seeds of 63 bits."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, longest, (count,), generator=generator).tolist()
    return [
        Request(tuple(torch.randint(3, 128, (length,), generator=generator).tolist()), 2**61 + 7 * index, new)
        for index, length in enumerate(lengths)
    ]


def check_cuts(engine: Engine, sampling: SamplingParams) -> None:
    """A response that is cut says so, and only that: a stop token in the last place allowed is a stop, one token less is not."""
    whole = [(one, request) for one, request in zip(engine.generate(requests(), sampling), requests(), strict=True) if one.finish == "stop"]
    whole = [(one, request) for one, request in whole if len(one.response_ids) > 1]
    assert whole, "no response stops; the test looks at nothing"
    exact = engine.generate([replace(request, max_new_tokens=len(one.response_ids)) for one, request in whole], sampling)
    short = engine.generate([replace(request, max_new_tokens=len(one.response_ids) - 1) for one, request in whole], sampling)
    for (one, _), last, cut in zip(whole, exact, short, strict=True):
        assert (last.finish, last.response_ids) == ("stop", one.response_ids)
        assert (cut.finish, cut.response_ids) == ("length", one.response_ids[:-1])
        assert len(cut.logprobs) == len(cut.response_ids)


def same(found: list[Sample], expected: list[Sample]) -> bool:
    """Whether the same tokens were drawn. What else is in the batch moves log-probs in their last digits."""
    return all(
        replace(a, logprobs=()) == replace(b, logprobs=()) and torch.allclose(torch.tensor(a.logprobs), torch.tensor(b.logprobs), atol=1e-4)
        for a, b in zip(found, expected, strict=True)
    )
