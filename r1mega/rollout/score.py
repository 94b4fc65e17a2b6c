"""Log-probs of sequences that are given, by the embedded engine's model."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from r1mega.rollout.cache import RowCache, Whole
from r1mega.rollout.engine import Scores, Scoring
from r1mega.rollout.limits import check_scorings


def score(model: PreTrainedModel, scorings: Sequence[Scoring], top_k: int, *, pass_tokens: int, pass_logits: int) -> list[Scores]:
    """Scores of each sequence, in order; see `Engine.score`.

    One forward pass reads at most `pass_tokens` tokens, padding included (a single sequence may be longer), and at most `pass_logits`
    logits exist at a time. Raises UserError, before anything is scored, for a sequence that the model cannot take.
    """
    check_scorings(scorings, top_k, model.config.vocab_size, model.config.max_position_embeddings)
    found: dict[int, Scores] = {}
    for places in _passes(scorings, pass_tokens):
        for place, hidden in zip(places, _read(model, [scorings[place] for place in places]), strict=True):
            labels = torch.tensor(scorings[place].ids[scorings[place].start :])
            found[place] = _scores(model.get_output_embeddings(), hidden, labels, top_k, pass_logits)
    return [found[place] for place in range(len(scorings))]


def _passes(scorings: Sequence[Scoring], tokens: int) -> Iterator[list[int]]:
    """Sequences that are read together: those of similar length, for they are padded to the longest."""
    waiting = sorted(range(len(scorings)), key=lambda place: len(scorings[place].ids))
    while waiting:
        longest = len(scorings[waiting[-1]].ids)
        count = max(1, tokens // longest)
        yield waiting[-count:]
        del waiting[-count:]


def _read(model: PreTrainedModel, scorings: Sequence[Scoring]) -> list[Tensor]:
    """For each sequence the hidden states [n, hidden] that its n scored tokens are predicted from."""
    lengths = torch.tensor([len(one.ids) for one in scorings])
    longest = int(lengths.max())
    ids = torch.tensor([(0,) * (longest - len(one.ids)) + one.ids for one in scorings])
    positions = (torch.arange(longest) - (longest - lengths)[:, None]).clamp_(min=0)
    cache = RowCache(model.config.num_hidden_layers, len(scorings), longest, latent=hasattr(model.config, "kv_lora_rank"))
    out = model.get_decoder()(
        input_ids=ids, position_ids=positions, use_cache=False, past_key_values=cache.latents, rows=Whole(cache, lengths)
    ).last_hidden_state
    return [row[one.start - 1 - len(one.ids) : -1] for row, one in zip(out, scorings, strict=True)]


def _scores(head: torch.nn.Module, hidden: Tensor, labels: Tensor, top_k: int, pass_logits: int) -> Scores:
    rows = max(1, pass_logits // head.out_features)  # type: ignore[operator]
    parts = []
    for states, wanted in zip(hidden.split(rows), labels.split(rows), strict=True):
        logprobs = head(states).float().log_softmax(-1)
        top = logprobs.topk(top_k, dim=-1)
        parts.append((logprobs.gather(1, wanted[:, None])[:, 0], top.indices, top.values))
    return Scores(*(torch.cat(part) for part in zip(*parts, strict=True)))
