"""The verdict on made-up facts, where an engine that errs so cannot be had; and what it is made of."""

from dataclasses import replace

import pytest
import torch

from r1mega.rollout.attribution import Facts, fitted_temperature, nucleus_logprobs, verdict
from r1mega.rollout.engine import Differences


def noise(scale: float, seed: int) -> torch.Tensor:
    return scale * torch.randn(400, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


TRUE = -2 * torch.rand(400, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
AGREED = Facts(
    recorded=TRUE,
    trainer=TRUE,
    trainer_plain=TRUE,
    engine_plain=TRUE,
    drawn=noise(1e-7, 1),
    temperature=1.0,
    top_p=1.0,
    fitted_temperature=1.0,
    fitted=TRUE,
    version=3,
    versions={3: 400},
    engine_dtype="bfloat16",
    trainer_dtype="bfloat16",
    differing=Differences((), 60),
)
OFF = noise(0.05, 2)
CASES = {
    "kernels": {"recorded": TRUE + OFF, "drawn": noise(0.05, 3)},
    "rest": {"recorded": TRUE + OFF, "engine_plain": TRUE + OFF},
    "routing": {"recorded": TRUE + OFF, "engine_plain": TRUE + OFF, "replayed": TRUE + OFF + noise(0.005, 4)},
    "version": {"recorded": TRUE + OFF, "versions": {2: 100, 3: 300}},
    "sampling": {"recorded": TRUE + OFF.abs(), "nucleus": TRUE + OFF.abs(), "top_p": 0.9},
    "precision": {"recorded": TRUE + OFF, "trainer_dtype": "float32", "rounded_plain": TRUE + noise(0.01, 5)},
    "weights": {"recorded": TRUE + OFF, "engine_plain": TRUE + OFF, "differing": Differences(("a", "b", "c", "d", "e"), 60)},
}


@pytest.mark.parametrize("name", CASES)
def test_each_cause_is_named_alone(name: str) -> None:
    found = verdict(replace(AGREED, **CASES[name]))
    assert [cause.name for cause in found.causes] == [name]
    assert name in found.line and "\n" not in found.line


def test_a_gap_that_rounding_cannot_make_is_not_precision() -> None:
    found = verdict(replace(AGREED, recorded=TRUE + OFF, trainer_dtype="float32", rounded_plain=TRUE + noise(0.0005, 5)))
    assert [cause.name for cause in found.causes] == ["rest"]


def test_wrong_weights_that_explain_nothing_are_not_the_cause() -> None:
    """One bit in one tensor, while the temperature is wrong: reading, the engine is right."""
    wrong = {"differing": Differences(("a",), 60), "fitted": TRUE + OFF, "fitted_temperature": 0.7}
    found = verdict(replace(AGREED, recorded=TRUE + OFF, **wrong))
    assert [cause.name for cause in found.causes] == ["sampling"]
    assert "of temperature 0.70, not 1" in found.line
    assert found.numbers["tensors_differing"] == 1


def test_weights_that_could_not_be_compared_are_said_to_be_so() -> None:
    found = verdict(replace(AGREED, recorded=TRUE + OFF, differing=None))
    assert [cause.name for cause in found.causes] == ["rest"] and "could not be compared" in found.line


def test_the_temperature_is_found_in_few_evaluations() -> None:
    logits = torch.randn(400, 50, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 2
    tokens = torch.randint(0, 50, (400,), generator=torch.Generator().manual_seed(2))
    asked: list[float] = []

    def logprobs(temperature: float) -> torch.Tensor:
        asked.append(temperature)
        return (logits / temperature).log_softmax(-1).gather(1, tokens[:, None])[:, 0]

    for true in (0.3, 0.7, 1.0, 1.31, 3.3):
        asked.clear()
        found, nearest = fitted_temperature(logprobs(true), logprobs, 1.0)
        assert found == pytest.approx(true, rel=0.01) and len(asked) <= 22
        assert torch.equal(nearest, logprobs(found))


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.5])
def test_the_nucleus_is_renormalised(temperature: float) -> None:
    logits = torch.randn(400, 50, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 2
    tokens = logits.argmax(-1, keepdim=True)
    tempered, plain = (logits / temperature).log_softmax(-1), logits.log_softmax(-1)
    ordered = tempered.exp().sort(descending=True)
    kept = ordered.values.cumsum(-1) - ordered.values < 0.8
    expected = tempered.gather(1, tokens)[:, 0] - (ordered.values * kept).sum(-1).log()
    top = plain.topk(40).values
    found = nucleus_logprobs(tempered.gather(1, tokens)[:, 0], plain.gather(1, tokens)[:, 0], top, temperature, 0.8)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
