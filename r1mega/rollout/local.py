"""The embedded engine: rollouts in the trainer's own process, through `transformers` models on CPU."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from r1mega.errors import UserError
from r1mega.rollout.cache import Decode, Pass, Prefill, RowCache
from r1mega.rollout.engine import Differences, Drawn, Request, Sample, SamplingParams, Scores, Scoring, ignored
from r1mega.rollout.hf import build, sparse_layers, weight_places
from r1mega.rollout.limits import check_requests
from r1mega.rollout.routing import check_routing, compact
from r1mega.rollout.sampling import draw, uniforms
from r1mega.rollout.score import score
from r1mega.weights.source import WeightSource

PREFILL_TOKENS = 4096
"""Prompt tokens in one forward pass at most, padding included (a single prompt may be longer)."""

LOGITS = 2**24
"""Logits that exist at a time at most."""


class LocalEngine:
    """Continuous batching over at most `max_batch` sequences.

    A sequence leaves the batch at the step that finishes it. Waiting requests enter once an eighth of the batch is free, for a pass over
    one prompt costs about as much as a step of the whole batch. Samples of one prompt that enter together share its pass.
    """

    colocated = False

    def __init__(self, model_dir: Path, *, dtype: torch.dtype = torch.float32, max_batch: int = 512) -> None:
        """Build the model of `model_dir/config.json`; weights in the folder are not read. UserError for a model we do not run."""
        self._model = build(model_dir, dtype)
        self._places = weight_places(self._model)
        self._max_batch = max_batch
        self._version: int | None = None

    def sync(self, source: WeightSource, version: int) -> None:
        """Take a source's weights; see `load_weights`."""
        self.load_weights(source.tensors(self._model.dtype), version)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Copy Hugging Face tensors into the model by name; those of MTP layers are passed over, as `transformers` has none.

        UserError names the first few tensors that are missing, unknown or of another shape; the engine then has no weights
        until a load succeeds.
        """
        config = self._model.config
        mtp = tuple(f"model.layers.{config.num_hidden_layers + depth}." for depth in range(getattr(config, "num_nextn_predict_layers", 0)))
        self._version = None
        missing = dict(self._places)
        wrong = []
        for name, tensor in weights:
            if name.startswith(mtp) or (name == "lm_head.weight" and config.tie_word_embeddings):
                continue
            place = missing.pop(name, None)
            if place is None:
                wrong.append(f"{name} came twice" if name in self._places else f"{name} is unknown")
            elif place.shape != tensor.shape:
                wrong.append(f"{name} is {list(tensor.shape)} instead of {list(place.shape)}")
            else:
                place.copy_(tensor.detach())
        wrong += [f"{name} is missing" for name in missing]
        if wrong:
            more = f" and {len(wrong) - 4} more" if len(wrong) > 4 else ""
            raise UserError(f"weights do not fit the rollout engine's model: {', '.join(wrong[:4])}{more}; export them again")
        self._version = version

    def generate(self, requests: Sequence[Request], sampling: SamplingParams) -> list[Sample]:
        """Draw one sample per request, in request order. UserError, before anything is drawn, for a request that the model cannot take."""
        return self.start(requests, sampling)()

    @torch.inference_mode()
    def start(self, requests: Sequence[Request], sampling: SamplingParams, drawn: Drawn = ignored) -> Callable[[], list[Sample]]:
        """Draw at once; see `Engine.start`."""
        if self._version is None:
            raise UserError("the rollout engine has no weights; load some before generating")
        config = self._model.config
        check_requests(requests, sampling, config.vocab_size, config.max_position_embeddings)
        check_routing(sampling, bool(sparse_layers(self._model)))
        samples = _Flight(self._model, requests, sampling, self._max_batch).run(self._version, drawn) if requests else []
        return lambda: samples

    @torch.inference_mode()
    def score(self, scorings: Sequence[Scoring], top_k: int) -> list[Scores]:
        """Score sequences, in order. UserError, before anything is scored, for a sequence that the model cannot take."""
        if self._version is None:
            raise UserError("the rollout engine has no weights; load some before scoring")
        return score(self._model, scorings, top_k, pass_tokens=PREFILL_TOKENS, pass_logits=LOGITS)

    def sleep(self) -> None:
        """Forget which weights the model has; see `Engine.sleep`."""
        self._version = None

    def differing(self, source: WeightSource) -> Differences:
        """Compare every tensor with the source's. A rank looks at its own engine."""
        places = self._places
        given = [(places[name], name, tensor) for name, tensor in source.tensors(self._model.dtype) if name in places]
        return Differences(tuple(name for place, name, tensor in given if not torch.equal(place, tensor.to(place.dtype))), len(given))

    def close(self) -> None:
        """Free the model; the engine is of no use afterwards."""
        del self._model, self._places
        self._version = None


class _Flight:
    """One `generate` call. `rows` [n] tells whose request each cache row in flight is; all other state is kept by request."""

    def __init__(self, model: PreTrainedModel, requests: Sequence[Request], sampling: SamplingParams, max_batch: int) -> None:
        self.decoder, self.head = model.get_decoder(), model.get_output_embeddings()
        self.requests, self.sampling = requests, sampling
        self.seeds = np.array([request.seed & (2**64 - 1) for request in requests], dtype=np.uint64)
        self.prompt_lengths = np.array([len(request.prompt_ids) for request in requests])
        self.begun = np.array([request.begun for request in requests])
        self.budgets = np.array([request.max_new_tokens for request in requests])
        self.stop_ids = np.array(sampling.stop_token_ids, dtype=np.int64)
        self.drawn = np.zeros(len(requests), dtype=np.int64)
        self.stopped = np.zeros(len(requests), dtype=bool)
        self.tokens = np.empty((len(requests), self.budgets.max()), dtype=np.int64)
        self.logprobs = np.empty(self.tokens.shape, dtype=np.float32)
        self.sparse = sparse_layers(model) if sampling.routing else []
        places = int((self.prompt_lengths + self.budgets).max()) - 1
        top_k = model.config.num_experts_per_tok if self.sparse else 0
        self.routing = compact(torch.zeros(len(requests), places, len(self.sparse), top_k), getattr(model.config, "n_routed_experts", 0))
        # Samples of one prompt enter together; so do prompts of similar length, for they are padded to the longest of a pass.
        self.waiting = sorted(range(len(requests)), key=lambda index: (self.prompt_lengths[index], requests[index].prompt_ids))
        self.capacity = min(max_batch, len(requests))
        self.rows = np.empty(0, dtype=np.int64)
        self.finished: list[int] = []
        latent = hasattr(model.config, "kv_lora_rank")
        self.cache = RowCache(model.config.num_hidden_layers, self.capacity, int(self.prompt_lengths.max()), latent=latent)

    def run(self, version: int, drawn: Drawn) -> list[Sample]:
        """Draw every request to its end, and tell of each that has come to it."""
        samples: dict[int, Sample] = {}
        while self.waiting or len(self.rows):
            free = self.capacity - len(self.rows)
            if self.waiting and free >= max(1, min(self.capacity // 8, len(self.waiting))):
                self._admit(free)
            else:
                self._step()
            for index in self.finished:
                samples[index] = self._sample(index, version)
                drawn(index, samples[index])
            self.finished = []
        return [samples[index] for index in range(len(self.requests))]

    def _admit(self, free: int) -> None:
        """Put waiting requests into free rows: one pass over their distinct prompts, then a first token for each."""
        prompts: dict[tuple[int, ...], int] = {}
        joined: list[int] = []
        owners: list[int] = []
        while self.waiting and len(joined) < free:
            prompt = self.requests[self.waiting[-1]].prompt_ids
            # The longest prompt waits at the end of the list, so the first one here sets the padded length.
            if prompt not in prompts and prompts and (len(prompts) + 1) * len(next(iter(prompts))) > PREFILL_TOKENS:
                break
            owners.append(prompts.setdefault(prompt, len(prompts)))
            joined.append(self.waiting.pop())
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        longest = int(lengths.max())
        ids = torch.tensor([(0,) * (longest - len(prompt)) + prompt for prompt in prompts])
        positions = (torch.arange(longest) - (longest - lengths)[:, None]).clamp_(min=0)
        owner = torch.tensor(owners)
        first = len(self.rows)
        hidden = self._forward(ids, positions, Prefill(self.cache, first, owner, lengths))
        self.rows = np.concatenate((self.rows, joined))
        if self.sparse:
            for index, prompt_routing in zip(joined, self._routed(*ids.shape)[owner], strict=True):
                length = self.prompt_lengths[index]
                self.routing[index, :length] = prompt_routing[longest - length :]
        self._draw(first, hidden[owner])

    def _step(self) -> None:
        """Feed every row its newest token and draw the next."""
        drawn = self.drawn[self.rows]
        newest = torch.from_numpy(self.tokens[self.rows, drawn - 1])
        lengths = torch.from_numpy(self.prompt_lengths[self.rows] + drawn)
        hidden = self._forward(newest[:, None], lengths[:, None] - 1, Decode(self.cache, lengths))
        if self.sparse:
            self.routing[torch.from_numpy(self.rows), lengths - 1] = self._routed(len(lengths), 1)[:, 0]
        self._draw(0, hidden)

    def _forward(self, ids: Tensor, positions: Tensor, rows: Pass) -> Tensor:
        """Hidden states [b, hidden] at the last of the tokens `ids` [b, s]."""
        out = self.decoder(input_ids=ids, position_ids=positions, use_cache=False, past_key_values=self.cache.latents, rows=rows)
        return out.last_hidden_state[:, -1]

    def _routed(self, rows: int, tokens: int) -> Tensor:
        """Experts [rows, tokens, sparse layers, top_k] of the pass that has just run."""
        found = torch.stack([cast(Tensor, layer.routed) for layer in self.sparse], dim=1)
        return found.view(rows, tokens, *found.shape[1:]).to(self.routing.dtype)

    def _draw(self, first: int, hidden: Tensor) -> None:
        """Draw a token for each row from `first` on, given their hidden states, and drop the rows that are finished."""
        rows = self.rows[first:]
        drawn = self.drawn[rows]
        uniform = torch.from_numpy(uniforms(self.seeds[rows], self.begun[rows] + drawn))
        chunk = max(1, LOGITS // self.head.out_features)
        parts = [draw(self.head(h), u, self.sampling) for h, u in zip(hidden.split(chunk), uniform.split(chunk), strict=True)]
        tokens = torch.cat([tokens for tokens, _ in parts]).numpy()
        self.tokens[rows, drawn] = tokens
        self.logprobs[rows, drawn] = torch.cat([logprobs for _, logprobs in parts]).numpy()
        self.drawn[rows] = drawn + 1
        stopped = np.isin(tokens, self.stop_ids)
        self.stopped[rows] = stopped
        finished = first + np.flatnonzero(stopped | (drawn + 1 == self.budgets[rows]))
        if len(finished):
            self._drop(finished)

    def _drop(self, finished: NDArray[np.int64]) -> None:
        """Move the last rows into those of finished sequences, so that the rows in flight stay the first ones."""
        self.finished += self.rows[finished].tolist()
        left = len(self.rows) - len(finished)
        holes = finished[finished < left]
        if len(holes):
            movers = np.setdiff1d(np.arange(left, len(self.rows)), finished, assume_unique=True)
            self.cache.move(torch.from_numpy(movers), torch.from_numpy(holes))
            self.rows[holes] = self.rows[movers]
        self.rows = self.rows[:left]

    def _sample(self, index: int, version: int) -> Sample:
        drawn, prompt_ids = int(self.drawn[index]), self.requests[index].prompt_ids
        return Sample(
            prompt_ids=prompt_ids,
            response_ids=tuple(self.tokens[index, :drawn].tolist()),
            logprobs=tuple(self.logprobs[index, :drawn].tolist()),
            finish="stop" if self.stopped[index] else "length",
            weight_version=version,
            # A copy: what is sent to other ranks takes its whole memory along.
            routing=self.routing[index, : len(prompt_ids) + drawn - 1].clone() if self.sparse else None,
        )
