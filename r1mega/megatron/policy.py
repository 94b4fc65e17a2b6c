"""A language model that is trained: log-probs, gradient steps, weights in and out. The only door to Megatron-Core for the stages."""

import math
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region, model_parallel_cuda_manual_seed
from megatron.core.transformer.moe.moe_layer import MoELayer
from torch import Tensor

from r1mega import heartbeat
from r1mega.config.layout import Layout
from r1mega.config.training import Optimizer, Train
from r1mega.data.packing import ROUTED, ROUTING, PackedBatch, TokenSequence, context_parallel_index, pack, plan_chunks
from r1mega.megatron import architecture, head, limits, model, offload, topology
from r1mega.megatron.exchange import Exchange
from r1mega.megatron.optimizer import optimizer_config, reduction_config
from r1mega.megatron.replay import Replay, RoutedPacking
from r1mega.planner.flops import forward_flops
from r1mega.weights.architecture import Architecture


@dataclass(frozen=True)
class LocalBatch:
    """One micro-batch as this rank sees it: its context-parallel share of every per-token tensor, whole boundaries.

    `extras` may be added to (`logprobs` results are kept there until the gradient step).
    """

    tokens: Tensor
    position_ids: Tensor
    labels: Tensor
    loss_weights: Tensor
    mtp_labels: Tensor
    mtp_weights: Tensor
    ends: Tensor
    """[tokens] int64, at a sequence's last token its index among the update's sequences, -1 elsewhere."""
    packing: RoutedPacking
    extras: dict[str, Tensor]

    @property
    def mask(self) -> Tensor:
        """bool [tokens]: positions whose prediction is trained on."""
        return self.loss_weights != 0


@dataclass(frozen=True)
class TokenLoss:
    """What an objective says about one micro-batch. `loss` [tokens] is weighted by the batch's loss weights and summed.

    For the metrics, the scalars of `sums` are added up over micro-batches and ranks and of those of `peaks` the largest is kept.
    """

    loss: Tensor
    sums: Mapping[str, Tensor] = field(default_factory=dict)
    peaks: Mapping[str, Tensor] = field(default_factory=dict)


Loss = Callable[[Tensor, LocalBatch], tuple[Tensor, TokenLoss]]
"""From the last stage's hidden states of a micro-batch to its share of the loss, and what of it goes into the metrics."""


class Objective(Protocol):
    """Per-token loss from log-probs and entropies [tokens] of the labels."""

    def __call__(self, logprobs: Tensor, entropies: Tensor, batch: LocalBatch) -> TokenLoss: ...


@dataclass(frozen=True)
class StepResult:
    """One optimizer step: `loss` is the weighted sum over all tokens of all ranks, `grad_norm` the global norm before clipping."""

    loss: float
    grad_norm: float
    sums: dict[str, float]
    peaks: dict[str, float]


class NotFinite(Exception):
    """Loss or gradient norm is NaN or infinite; the step was not applied."""


class Policy:
    """One model under one layout, with its optimizer when it is trained."""

    def __init__(self, arch: Architecture, layout: Layout, train: Train, optimizer: Optimizer | None, seed: int = 1) -> None:
        """Connect the layout's process groups and build this rank's shards, uninitialised: fill them through `exchange` first.

        Raises:
            UserError: the layout does not fit the model or the world, or would train wrongly.
        """
        topology.check(arch, layout, dist.get_world_size())
        arch, layout = limits.trained(arch, layout, train.mtp_loss)
        topology.connect(layout)
        model_parallel_cuda_manual_seed(seed)
        self.arch, self.layout, self.train = arch, layout, train
        self.config = architecture.transformer_config(arch, layout, train)
        self.chunks = model.build(arch, layout, self.config)
        self.weights = model.named_weights(self.chunks)
        self._replay = Replay(self.chunks, arch)
        self.exchange = Exchange(arch, layout, self.weights)
        for local in self.exchange.placed:
            # Megatron-Core sets this mark only when it initialises weights itself; the gradient norm counts a parameter without it
            # on the first tensor-parallel rank alone.
            if "tp" not in local.replicated and not local.is_buffer:
                self.weights[local.chunk, local.name].tensor_model_parallel = True  # type: ignore[attr-defined]
        self.optimizer_settings = optimizer
        self.steps = 0
        """Optimizer steps taken."""
        self._wrapped: list[Any] = list(self.chunks)
        self._optimizer: Any = None
        self._tp_group = parallel_state.get_tensor_model_parallel_group()

    # ------------------------------------------------------------ batches

    @property
    def dp_rank(self) -> int:
        return int(parallel_state.get_data_parallel_rank())

    @property
    def dp_size(self) -> int:
        return int(parallel_state.get_data_parallel_world_size())

    @property
    def pad_to(self) -> int:
        """Multiple that each packed sequence is padded to."""
        return limits.pad_to(self.layout)

    @property
    def align(self) -> int:
        """Multiple that a micro-batch is padded to: context parallelism, sequence parallelism, and FP8's 16-row (mxfp8: 32) tiles."""
        fp8 = {"none": 1, "mxfp8": 32}.get(self.train.fp8, 16)
        return math.lcm(self.pad_to, self.layout.tp * self.layout.cp * fp8)

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank computes losses."""
        return bool(parallel_state.is_pipeline_last_stage(ignore_virtual=True))

    def microbatches(self, sequences: Sequence[TokenSequence]) -> list[LocalBatch]:
        """Pack the sequences of one update, the same list on every rank, and keep this rank's share.

        Every data-parallel rank gets as many micro-batches. Raises UserError for a sequence longer than `train.chunk_tokens`.
        """
        lengths = [len(sequence.tokens) for sequence in sequences]
        # The interleaved schedule runs micro-batches in rounds of pp. Filling a round with empty ones would cost as much as real ones,
        # and their padding would be counted by the routers.
        rounds_of = self.layout.pp if self.layout.vpp > 1 else 1
        plan = plan_chunks(lengths, self.train.chunk_tokens, self.dp_size, self.pad_to, partial(forward_flops, self.arch), rounds_of)
        chunks = plan[self.dp_rank]
        return [self._share(pack(sequences, chunk, self.pad_to, self.align)) for chunk in chunks]

    def _share(self, batch: PackedBatch) -> LocalBatch:
        device = self.device
        cp, rank = self.layout.cp, parallel_state.get_context_parallel_rank()
        held = slice(None) if cp == 1 else context_parallel_index(batch.cu_seqlens, cp, rank)

        def share(x: Tensor) -> Tensor:
            return x[held].to(device, non_blocking=True)

        longest = int((batch.cu_seqlens[1:] - batch.cu_seqlens[:-1]).max())
        boundaries = batch.cu_seqlens.to(device)
        return LocalBatch(
            tokens=share(batch.tokens),
            position_ids=share(batch.position_ids),
            labels=share(batch.labels),
            loss_weights=share(batch.loss_weights),
            mtp_labels=share(batch.mtp_labels),
            mtp_weights=share(batch.mtp_weights),
            ends=share(batch.ends),
            packing=RoutedPacking(
                qkv_format="thd",
                cu_seqlens_q=boundaries,
                cu_seqlens_kv=boundaries,
                max_seqlen_q=longest,
                max_seqlen_kv=longest,
                routing=self._replay.share(batch.extras, share),
            ),
            extras={name: share(values) for name, values in batch.extras.items() if name not in (ROUTING, ROUTED)},
        )

    # ------------------------------------------------------------ forward

    @torch.no_grad()
    def logprobs(self, batches: Sequence[LocalBatch], temperature: float = 1.0, replay: bool = True) -> list[Tensor] | None:
        """Log-probs [tokens] of the labels of each micro-batch, 0 where the loss weight is 0; None off the last pipeline stage.

        Without `replay`, routers choose the experts even where an engine's choice is known: other weights are another model.
        """
        found: list[Tensor] = []

        def collect(hidden: Tensor, batch: LocalBatch) -> tuple[Tensor, dict[str, Any]]:
            logprobs, _ = self._head(self.trunk(hidden), batch.labels, batch.mask, temperature)
            found.append(logprobs)
            return hidden.new_zeros(()), {}

        self.run(batches, collect, forward_only=True, replay=replay)
        return found if self.is_last_stage else None

    def step(self, batches: Sequence[LocalBatch], objective: Objective, lr: float, temperature: float = 1.0) -> StepResult:
        """One optimizer step over this rank's micro-batches; every data-parallel rank calls it with as many.

        The loss is sum(loss_weights x per-token loss) over all ranks: the weights hold every normaliser.

        Raises:
            NotFinite: loss or gradient norm is not finite; parameters, router biases and optimizer are as they were.
        """
        return self.descend(batches, lambda hidden, batch: self._loss(hidden, batch, objective, temperature), lr)

    def descend(self, batches: Sequence[LocalBatch], lose: Loss, lr: float) -> StepResult:
        """One optimizer step down what `lose` makes of the last stage's hidden states; see `step`, which says what errors there are."""
        # Megatron-Core updates the router biases with the gradients, before anyone has looked at these.
        biases = {key: weight.clone() for key, weight in self.weights.items() if not weight.requires_grad}
        try:
            with heartbeat.phase("train"):
                return self._descend(batches, lose, lr)
        except NotFinite:
            for key, bias in biases.items():
                self.weights[key].copy_(bias)
            raise

    def _descend(self, batches: Sequence[LocalBatch], lose: Loss, lr: float) -> StepResult:
        optimizer = self.optimizer
        for chunk in self._wrapped:
            chunk.zero_grad_buffer()
        optimizer.zero_grad()
        sums: dict[str, Tensor] = {}
        peaks: dict[str, Tensor] = {}
        # Auxiliary losses come summed over tokens; the main loss, already normalised, is scaled up so that one divisor serves both.
        tokens = self._total(sum(batch.tokens.shape[0] for batch in batches)) * self.layout.cp
        self.config.grad_scale_func = lambda loss: loss / tokens

        def scaled(hidden: Tensor, batch: LocalBatch) -> tuple[Tensor, dict[str, Any]]:
            loss, parts = lose(hidden, batch)
            for name, value in parts.sums.items():
                sums[name] = sums[name] + value.detach() if name in sums else value.detach()
            for name, value in parts.peaks.items():
                peaks[name] = torch.maximum(peaks[name], value.detach()) if name in peaks else value.detach()
            return loss * tokens, {}

        self.run(batches, scaled, forward_only=False)
        totals, highest = self._over_ranks(sums, dist.ReduceOp.SUM), self._over_ranks(peaks, dist.ReduceOp.MAX)
        loss = totals.pop("loss")
        if not math.isfinite(loss):
            raise NotFinite(f"the loss is {loss}")
        grad_norm = self._apply(optimizer, lr)
        return StepResult(loss, grad_norm, totals, highest)

    def _loss(self, hidden: Tensor, batch: LocalBatch, objective: Objective, temperature: float) -> tuple[Tensor, TokenLoss]:
        logprobs, entropies = self._head(self.trunk(hidden), batch.labels, batch.mask, temperature)
        token_loss = objective(logprobs, entropies, batch)
        loss = (batch.loss_weights * token_loss.loss).sum()
        sums = {"loss": loss, **token_loss.sums}
        if self.config.mtp_num_layers:
            wanted = batch.mtp_weights != 0
            mtp_logprobs, _ = self._head(hidden[hidden.shape[0] // 2 :], batch.mtp_labels, wanted, 1.0)
            mtp = -(batch.mtp_weights * mtp_logprobs).sum()
            sums["mtp_loss"] = mtp
            loss = loss + self.train.mtp_loss * mtp
        return loss, replace(token_loss, sums=sums)

    def trunk(self, hidden: Tensor) -> Tensor:
        """Of the last stage's hidden states those that the head reads, without the MTP layer's."""
        return hidden.chunk(2)[0] if self.config.mtp_num_layers else hidden

    def listed_logprobs(self, hidden: Tensor, labels: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probs [tokens, k] of the labels [tokens, k] and of everything else [tokens], 0 where not wanted; see `head.listed_logprobs`.

        For losses of `descend`: `hidden` is what `trunk` returns, on the last pipeline stage.
        """
        rows = wanted.nonzero()[:, 0]
        states, weight = self._head_inputs(hidden, rows)
        logprobs, rest = head.listed_logprobs(
            states, weight, labels[rows], vocab=self.arch.vocab, chunk=self.train.logprob_chunk, tp_group=self._tp_group
        )
        return logprobs.new_zeros(labels.shape).index_copy(0, rows, logprobs), rest.new_zeros(labels.shape[0]).index_copy(0, rows, rest)

    def _head(self, hidden: Tensor, labels: Tensor, wanted: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """Log-probs and entropies [tokens] of the wanted labels, 0 elsewhere: prompt tokens never meet the vocabulary."""
        rows = wanted.nonzero()[:, 0]
        states, weight = self._head_inputs(hidden, rows)
        logprobs, entropies = head.token_logprobs(
            states,
            weight,
            labels[rows],
            vocab=self.arch.vocab,
            temperature=temperature,
            chunk=self.train.logprob_chunk,
            tp_group=self._tp_group,
        )
        blank = logprobs.new_zeros(labels.shape)
        return blank.index_copy(0, rows, logprobs), blank.index_copy(0, rows, entropies)

    def _head_inputs(self, hidden: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states of some tokens, the same on every tensor-parallel rank, and this rank's shard of the output embedding."""
        last = self.chunks[-1]
        if self.layout.tp > 1:
            # The backward is a reduce-scatter: each rank's vocabulary shard adds its part of the gradient.
            hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True, group=self._tp_group)
        weight = last.shared_embedding_or_output_weight() if self.arch.tied else last.output_layer.weight
        return hidden.squeeze(1).index_select(0, rows), weight

    def routing_disagreement(self, batches: Sequence[LocalBatch]) -> dict[str, float]:
        """Shares of tokens and routers whose experts the trainer would have chosen otherwise; see `Replay.disagreement`.

        Empty where nothing was recorded. It says something of the last pass with replay: of a step, of its weights before.
        """
        routings = [batch.packing.routing for batch in batches if batch.packing.routing is not None]
        return self._replay.disagreement(routings) if routings else {}

    def run(
        self,
        batches: Sequence[LocalBatch],
        finish: Callable[[Tensor, LocalBatch], tuple[Tensor, dict[str, Any]]],
        forward_only: bool,
        replay: bool = True,
    ) -> None:
        """Megatron-Core's schedule (none, 1F1B, interleaved) over the micro-batches; `finish` is called on the last stage."""
        for chunk in self._wrapped:
            chunk.train(not forward_only)

        def forward(data: Iterator[LocalBatch], chunk: Any) -> tuple[Tensor, Callable[[Tensor], Any]]:
            batch = next(data)
            hidden = chunk(
                input_ids=batch.tokens[None],
                position_ids=batch.position_ids[None],
                attention_mask=None,
                labels=batch.labels[None],
                packed_seq_params=batch.packing if replay else replace(batch.packing, routing=None),
            )
            return hidden, partial(_finished, batch, finish)

        get_forward_backward_func()(
            forward_step_func=forward,
            data_iterator=[iter(batches) for _ in self._wrapped] if len(self._wrapped) > 1 else iter(batches),
            model=self._wrapped if len(self._wrapped) > 1 else self._wrapped[0],
            num_microbatches=len(batches),
            seq_length=self.train.chunk_tokens,
            micro_batch_size=1,
            forward_only=forward_only,
        )

    # ------------------------------------------------------------ optimizer

    @property
    def optimizer(self) -> Any:
        """Megatron-Core's optimizer, made on first use: it copies the weights, so they must be loaded before."""
        if self._optimizer is None:
            settings = self.optimizer_settings
            if settings is None:
                raise RuntimeError("this policy was built without an optimizer")
            ddp = reduction_config(settings, self.train)
            self._wrapped = [
                DistributedDataParallel(self.config, ddp, chunk, disable_bucketing=index > 0) for index, chunk in enumerate(self.chunks)
            ]
            weakref.finalize(self, _release, self._wrapped).atexit = False
            self.config.finalize_model_grads_func = _finalize
            self.config.no_sync_func = [chunk.no_sync for chunk in self._wrapped] if len(self._wrapped) > 1 else self._wrapped[0].no_sync
            self._optimizer = get_megatron_optimizer(optimizer_config(settings, self.train), self._wrapped, use_gloo_process_groups=False)
        return self._optimizer

    def _apply(self, optimizer: Any, lr: float) -> float:
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.prepare_grads()
        norm = float(optimizer.get_grad_norm())
        if not math.isfinite(norm):
            raise NotFinite(f"the gradient norm is {norm}")
        optimizer.step()
        self.steps += 1
        return norm

    # ------------------------------------------------------------ other weights in the same shards

    def host_copy(self) -> list[Tensor]:
        """This rank's weights, copied to host memory."""
        return [weight.detach().to("cpu", copy=True) for weight in self.weights.values()]

    @contextmanager
    def holding(self, other: Sequence[Tensor | None]) -> Iterator[None]:
        """Compute with other weights of the same shapes (a reference, a reward model) while this policy's wait on the host.

        They come in the order of `weights`; None leaves a weight as it is.

        There is never a second model on the device.
        """
        own = self.host_copy()
        self._put(other)
        try:
            yield
        finally:
            self._put(own)

    @torch.no_grad()
    def _put(self, values: Sequence[Tensor | None]) -> None:
        for weight, value in zip(self.weights.values(), values, strict=True):
            if value is not None:
                weight.copy_(value)

    # ------------------------------------------------------------ memory lent to an engine

    @contextmanager
    def without_training_state(self) -> Iterator[None]:
        """Between steps: have optimizer states and main parameters wait on the host, and drop the gradients, made anew by every step."""
        if self._optimizer is None:
            yield
            return
        with offload.on_host(*self.training_state()):
            yield

    def training_state(self) -> tuple[list[Tensor], list[Tensor]]:
        """What steps keep on the device beside the weights: the optimizer's states and main parameters, and the gradients' buffers."""
        optimizer = self.optimizer
        weights = {weight.untyped_storage().data_ptr() for weight in self.weights.values()}
        inner = [part.optimizer for part in getattr(optimizer, "chained_optimizers", [optimizer])]
        mains = [main for one in inner for group in one.param_groups for main in group["params"]]
        states = [value for one in inner for state in one.state.values() for value in state.values() if isinstance(value, Tensor)]
        # Of a float32 model the optimizer steps the parameters themselves, in their own storage.
        kept = [tensor for tensor in (*mains, *states) if tensor.untyped_storage().data_ptr() not in weights]
        return kept, [buffer.grad_data for chunk in self._wrapped for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)]

    @contextmanager
    def without_weights(self) -> Iterator[None]:
        """Have the weights wait on the host; nothing may read them in the block, `exchange` included."""
        with offload.on_host(self.weights.values()):
            yield

    # ------------------------------------------------------------ sums over ranks

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(iter(self.weights.values())).device

    def _total(self, value: float) -> float:
        """Sum over the data-parallel ranks."""
        total = torch.tensor([float(value)], device=self.device)
        dist.all_reduce(total, group=parallel_state.get_data_parallel_group())
        return total.item()

    @property
    def counts(self) -> bool:
        """Whether what this rank knows of its tokens is to be counted: on the last stage, where all tensor-parallel ranks know the same."""
        return self.is_last_stage and parallel_state.get_tensor_model_parallel_rank() == 0

    def total(self, values: Tensor) -> Tensor:
        """Sums over all ranks of what those that `counts` have; the others bring zeros of the same shape."""
        return self._reduced(values, dist.ReduceOp.SUM)

    def highest(self, values: Tensor) -> Tensor:
        """The largest over all ranks, as `total`; ranks that do not count bring -inf."""
        return self._reduced(values, dist.ReduceOp.MAX)

    def over_context(self, values: Tensor) -> Tensor:
        """Sums over the ranks that sequences are cut over."""
        group = parallel_state.get_context_parallel_group()
        if group.size() > 1:
            dist.all_reduce(values, group=group)
        return values

    def _reduced(self, values: Tensor, op: Any) -> Tensor:
        values = values.to(self.device, copy=True)
        dist.all_reduce(values, op=op)
        return values

    def _over_ranks(self, scalars: Mapping[str, Tensor], op: Any) -> dict[str, float]:
        """Scalars of the last stage's micro-batches, reduced over data and context parallelism and known to every rank."""
        names: list[Any] = [sorted(scalars) if self.is_last_stage else None]
        dist.broadcast_object_list(names, src=dist.get_world_size() - 1)
        neutral = 0.0 if op == dist.ReduceOp.SUM else -math.inf
        flat = torch.tensor([float(scalars[name]) if self.counts else neutral for name in names[0]], dtype=torch.float64)
        return dict(zip(names[0], self._reduced(flat, op).tolist(), strict=True))


def _finished(batch: LocalBatch, finish: Callable[[Tensor, LocalBatch], tuple[Tensor, dict[str, Any]]], hidden: Tensor) -> Any:
    loss, report = finish(hidden, batch)
    return loss, torch.zeros((), dtype=torch.int, device=loss.device), report


def _finalize(chunks: list[Any], num_tokens: Tensor | None = None, **kwargs: Any) -> None:
    """Megatron-Core's gradient reductions without its division by tokens: the loss weights hold the normaliser."""
    del num_tokens
    finalize_model_grads(chunks, None, **kwargs)


def _release(chunks: list[Any]) -> None:
    """Let a trained model be freed: its gradient hooks refer to it through autograd's nodes, where no garbage collector sees the cycle."""
    for chunk in chunks:
        chunk.grad_accs.clear()
        for module in chunk.modules():
            if isinstance(module, MoELayer):
                module.token_dispatcher = None  # keeps the last micro-batch's graph
