"""Scores of given sequences against ordinary forward passes of `transformers`' own models."""

from pathlib import Path

import pytest
import torch
from test_rollout_local import CONFIGS, VOCAB, engine, prompts, reference

from r1mega.errors import UserError
from r1mega.rollout import local
from r1mega.rollout.engine import Request, SamplingParams, Scoring


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path


def ragged() -> list[Scoring]:
    """Sequences of 2 to 24 tokens, scored from a different token each."""
    return [Scoring(ids, 1 + index % (len(ids) - 1)) for index, ids in enumerate(prompts(17, longest=24)) if len(ids) > 1]


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("pass_tokens", [4096, 30])
def test_scores_are_those_of_an_ordinary_forward_pass(folder: Path, kind: str, pass_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "PREFILL_TOKENS", pass_tokens)
    monkeypatch.setattr(local, "LOGITS", 5 * VOCAB if pass_tokens == 30 else local.LOGITS)
    scorings = ragged()
    found = engine(folder, kind).score(scorings, 7)
    for one, scores in zip(scorings, found, strict=True):
        with torch.no_grad():
            logits = reference(kind)(input_ids=torch.tensor([one.ids]), use_cache=False).logits[0, one.start - 1 : -1]
        expected = logits.float().log_softmax(-1)
        assert torch.allclose(scores.logprobs, expected.gather(1, torch.tensor(one.ids[one.start :])[:, None])[:, 0], atol=1e-4)
        top = expected.topk(7)
        assert torch.allclose(scores.top_logprobs, top.values, atol=1e-4)
        assert torch.allclose(expected.gather(1, scores.top_ids), top.values, atol=1e-4)  # ties may come in another order


def test_what_was_drawn_scores_as_it_was_drawn(folder: Path) -> None:
    built = engine(folder)
    samples = built.generate([Request(prompt, seed, 20) for seed, prompt in enumerate(prompts(6))], SamplingParams())
    found = built.score([Scoring(one.prompt_ids + one.response_ids, len(one.prompt_ids)) for one in samples], 0)
    assert max(float((scores.logprobs - torch.tensor(one.logprobs)).abs().max()) for one, scores in zip(samples, found, strict=True)) < 1e-4
    assert found[0].top_ids.shape == (len(samples[0].response_ids), 0)


def test_what_cannot_be_scored_is_refused(folder: Path) -> None:
    built = engine(folder)
    limit = CONFIGS["v3"]().max_position_embeddings
    for scoring, top_k, reason in [
        (Scoring((1, 2), 0), 0, "sequence 0: 2 tokens cannot be scored from token 0 on"),
        (Scoring((1, 2), 2), 0, "cannot be scored from token 2 on"),
        (Scoring((1, VOCAB), 1), 0, "outside the vocabulary"),
        (Scoring((1,) * (limit + 1), 1), 0, "exceed the model's context"),
        (Scoring((1, 2), 1), VOCAB + 1, "is not within the vocabulary"),
    ]:
        with pytest.raises(UserError, match=reason):
            built.score([scoring], top_k)
    assert built.score([], 3) == []
