"""Training checkpoints in Megatron-Core's distributed format: written beside the training, loaded under any layout."""

import inspect
import json
import multiprocessing
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from multiprocessing.managers import SyncManager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_outplace
from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject, ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from r1mega import heartbeat
from r1mega.errors import UserError
from r1mega.megatron.policy import Policy
from r1mega.process import die_with_parent
from r1mega.weights.dist_checkpoint import stored_shapes

_STATE = "state.json"
# Megatron-Core 0.19 has a second writer, for which it needs a package that exists with CUDA only.
_WRITER = {"async_strategy": "mcore"} if "async_strategy" in inspect.signature(dist_checkpointing.save).parameters else {}


@cache
def start_results_process() -> SyncManager:
    """The process that keeps what Megatron-Core's writers report. Megatron-Core's own would outlive a rank that is killed."""
    manager = SyncManager(ctx=multiprocessing.get_context("spawn"))
    manager.start(initializer=die_with_parent)
    filesystem_async._results_queue = manager.Queue()
    return manager


class Checkpoints:
    """The checkpoints of one stage. Every rank makes every call.

    A checkpoint appears in the folder once every rank's files are on disk, and its older siblings then go. With
    `train.async_save` the files are written by processes forked from the ranks, which hold the weights as they were at the
    call: the training goes on, and calls `poll` now and then and `wait` at its end.
    """

    def __init__(self, policy: Policy, folder: Path) -> None:
        self._policy, self._folder = policy, folder
        self._calls = AsyncCallsQueue()
        self._writing = ""

    @heartbeat.phase("save")
    def save(self, name: str, state: Mapping[str, Any], reference: list[Tensor] | None) -> None:
        """Write `folder/name`, after the one before is written.

        Args:
            state: plain JSON values, such as the number of updates done.
            reference: weights as `Policy.host_copy` gives them, saved beside the policy's own.

        Raises:
            UserError: this checkpoint, or the one before, could not be written.
        """
        self.wait()
        start_results_process()
        self._writing = name
        partial = self._begin(name)
        states = describe(self._policy, reference, is_loading=False)
        request = dist_checkpointing.save(states, str(partial), async_sharded_save=True, content_metadata=metadata(), **_WRITER)
        state = {"steps": self._policy.steps, "state": dict(state)}
        request.add_finalize_fn(lambda: self._publish(partial, name, state))
        try:
            if self._policy.train.async_save:
                self._calls.schedule_async_request(request)
            else:
                request.execute_sync()
        except (CheckpointException, OSError) as error:
            raise self._failed(error) from error

    def poll(self) -> None:
        """Let a checkpoint appear if every rank has written it."""
        self._finish(blocking=False)

    @heartbeat.phase("save")
    def wait(self) -> None:
        """Return when the last checkpoint has appeared."""
        self._finish(blocking=True)

    def restore(self, reference: list[Tensor] | None) -> dict[str, Any] | None:
        """Load the newest checkpoint into the policy and its optimizer and, in place, the reference; None when there is none.

        Returns:
            The saved state.

        Raises:
            UserError: the checkpoint is damaged, or not one of this model.
        """
        found: list[str | None] = [str(newest(self._folder) or "") if dist.get_rank() == 0 else None]
        dist.broadcast_object_list(found, src=0)
        return load(self._policy, Path(found[0]), reference) if found[0] else None

    def _finish(self, blocking: bool) -> None:
        try:
            self._calls.maybe_finalize_async_calls(blocking=blocking)
        except (CheckpointException, OSError) as error:
            raise self._failed(error) from error

    def _failed(self, error: CheckpointException | OSError) -> UserError:
        causes = [failure[0] for failure in error.failures.values()] if isinstance(error, CheckpointException) else [error]
        why = " ".join(str(causes[0]).split()) if causes else "see the log of rank 0"
        free = shutil.disk_usage(self._folder).free if self._folder.exists() else 0
        return UserError(f"{self._folder / self._writing}: the checkpoint could not be written: {why}; {free:,} bytes are free there")

    def _begin(self, name: str) -> Path:
        """A fresh folder for the files, on every rank. A killed run's writer may still be busy in one of its own."""
        partial: list[Any] = [self._folder / f".{name}.{os.getpid()}.partial"]
        if dist.get_rank() == 0:
            try:
                shutil.rmtree(partial[0], ignore_errors=True)
                partial[0].mkdir(parents=True)
            except OSError as error:
                raise self._failed(error) from error
        dist.broadcast_object_list(partial, src=0)
        path: Path = partial[0]
        return path

    def _publish(self, partial: Path, name: str, state: Mapping[str, Any]) -> None:
        if dist.get_rank() == 0:
            # Written last: a folder without it is not a checkpoint.
            (partial / _STATE).write_text(json.dumps(state), encoding="utf-8")
            folder = self._folder / name
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(partial, folder)
            for older in self._folder.iterdir():
                if older != folder:
                    shutil.rmtree(older, ignore_errors=True)
        dist.barrier()


def newest(parent: Path) -> Path | None:
    """The checkpoint to go on from, if there is one. Only one is ever kept whole."""
    found = sorted(folder for folder in parent.glob("[!.]*") if (folder / _STATE).is_file())
    return found[-1] if found else None


def load(policy: Policy, folder: Path, reference: list[Tensor] | None) -> dict[str, Any]:
    """Fill the policy, its optimizer and, in place, the reference; returns the saved state. Errors are those of `restore`."""
    saved = _read_state(folder)
    _give_states(policy.optimizer, saved["steps"])
    tensors: dict[str, Any] = {}

    def take_out(value: Any) -> Any:
        if not isinstance(value, ShardedTensor | ShardedTensorFactory):
            return value.unwrap() if isinstance(value, LocalNonpersistentObject) else value
        tensors[str(len(tensors))] = value
        return _Place(str(len(tensors) - 1))

    # Only tensors are taken from the files. What else describes the optimizer is this rank's own: the files hold that of the
    # saving run's rank 0, which may have had other parameters.
    outline = dict_list_map_outplace(take_out, describe(policy, reference, is_loading=True))
    check(folder, tensors)
    try:
        loaded = dist_checkpointing.load(dict(tensors), str(folder))
    except CheckpointException as error:
        raise UserError(f"{folder}: the checkpoint cannot be read: {' '.join(str(error).split())[:500]}") from error
    states = dict_list_map_outplace(lambda value: loaded[value] if isinstance(value, _Place) else value, outline)
    with torch.no_grad():
        for (chunk, name), weight in policy.weights.items():
            weight.copy_(states[f"model{chunk}"][name])
    policy.optimizer.load_state_dict(states["optimizer"])
    policy.steps = saved["steps"]
    _set_steps(policy.optimizer, policy.steps)
    if reference is not None:
        for (chunk, name), old in zip(policy.weights, reference, strict=True):
            old.copy_(states[f"reference{chunk}"][f"reference.{name}"])
    state: dict[str, Any] = saved["state"]
    return state


class _Place(str):
    """Where a tensor of the outline stands among the loaded ones."""


def _read_state(folder: Path) -> dict[str, Any]:
    try:
        state = json.loads((folder / _STATE).read_text(encoding="utf-8"))
        return {"steps": int(state["steps"]), "state": dict(state["state"])}
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{folder / _STATE}: damaged; remove {folder} to start without this checkpoint") from None


def check(folder: Path, tensors: Mapping[str, Any]) -> None:
    """Compare a checkpoint with what all ranks want of it.

    Raises:
        UserError: on every rank: the file that is missing or short, or the tensor that is missing, unexpected or of another shape.
    """
    wanted = {part.key: part for tensor in tensors.values() for part in _parts(tensor)}
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, (_problem(folder, wanted), set(wanted)))
    for problem, _ in found:
        if problem:
            raise UserError(problem)
    unexpected = stored_shapes(folder).keys() - set().union(*(keys for _, keys in found))
    if unexpected:
        raise UserError(f"{folder}: not a checkpoint of this model, which has no {_first(unexpected)}")


def _parts(tensor: Any) -> list[ShardedTensor]:
    return tensor.build() if isinstance(tensor, ShardedTensorFactory) else [tensor]


def _problem(folder: Path, wanted: Mapping[str, ShardedTensor]) -> str | None:
    """Why the folder is not a checkpoint of these tensors, if it is not."""
    try:
        shapes = stored_shapes(folder)
    except UserError as error:
        return str(error)
    missing = wanted.keys() - shapes.keys()
    if missing:
        return f"{folder}: not a checkpoint of this model: it has no {_first(missing)}"
    for key, tensor in wanted.items():
        # Megatron-Core pads the vocabulary for its tensor-parallel size, and cuts or fills on loading.
        free = 1 if tensor.allow_shape_mismatch else 0
        if shapes[key][free:] != tuple(tensor.global_shape)[free:]:
            return f"{folder}: not a checkpoint of this model: {key} is {list(shapes[key])}, the model's {list(tensor.global_shape)}"
    return None


def _first(keys: set[str]) -> str:
    return min(keys) + (f" and {len(keys) - 1} more tensors" if len(keys) > 1 else "")


def _give_states(optimizer: Any, steps: int) -> None:
    """Zero states for torch's AdamW, which has none before its first step; Megatron-Core describes what it finds."""
    for inner in _inner(optimizer):
        if isinstance(inner, torch.optim.AdamW):
            for group in inner.param_groups:
                for parameter in group["params"]:
                    if not inner.state[parameter]:
                        inner.state[parameter] = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
    _set_steps(optimizer, steps)


def _set_steps(optimizer: Any, steps: int) -> None:
    """The count behind Adam's bias correction: torch keeps one for each parameter, Transformer Engine and Apex one for each group."""
    for inner in _inner(optimizer):
        if isinstance(inner, torch.optim.AdamW):
            for state in inner.state.values():
                # A tensor for each: AdamW would count a shared one, which is what Megatron-Core loads, up once for every parameter.
                state["step"] = torch.tensor(float(steps))
        else:
            for group in inner.param_groups:
                group["step"] = steps


def _inner(optimizer: Any) -> list[torch.optim.Optimizer]:
    """The optimizers that do the work: torch's AdamW, or the fused ones of Transformer Engine or Apex."""
    return [part.optimizer for part in getattr(optimizer, "chained_optimizers", [optimizer])]


def metadata() -> dict[str, Any]:
    """How Megatron-Core is asked to lay out states: Megatron-LM's defaults, with optimizer states that load under another layout.

    Those are saved by parameter, not by buffer, and under names that do not count the optimizers of a rank.
    """
    return {
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
        "distrib_optim_sharding_type": "fully_reshardable",
        "distrib_optim_fully_reshardable_mem_efficient": False,
    }


def describe(policy: Policy, reference: list[Tensor] | None, is_loading: bool) -> dict[str, Any]:
    """What of the checkpoint this rank holds, as Megatron-Core's sharded tensors. Keys: see `weights.checkpoint_keys`."""
    found: dict[str, Any] = {}
    for index, chunk in enumerate(policy.chunks):
        found[f"model{index}"] = _tensors(chunk.sharded_state_dict(metadata=metadata()))
    with _padding_counted(policy.optimizer):
        found["optimizer"] = policy.optimizer.sharded_state_dict(dict(found), is_loading=is_loading, metadata=metadata())
    if reference is not None:
        with policy.holding(reference):
            for index, chunk in enumerate(policy.chunks):
                part = _tensors(chunk.sharded_state_dict(prefix="reference.", metadata=metadata()))
                for sharded in part.values():
                    sharded.data = sharded.data.detach().clone()  # the policy's own weights come back into these parameters
                found[f"reference{index}"] = part
    return found


@contextmanager
def _padding_counted(optimizer: Any) -> Iterator[None]:
    """Let the distributed optimizer find its own states.

    Megatron-Core (0.16, 0.19) joins a buffer's buckets without the padding between them, and then looks for the parameters where they
    stand with it. An embedding that two pipeline stages share has a bucket of its own: its states, main weights included, and
    those of what follows were saved shifted by the padding, with a warning at most.
    """
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    buffers = [buffer for part in parts for buffer in getattr(part, "buffers", [])]
    spans = [(buffer, buffer.numel) for buffer in buffers]
    spans += [(bucket, bucket.grad_data.numel()) for buffer in buffers for bucket in buffer.buckets]
    before = [span.numel_unpadded for span, _ in spans]
    for span, size in spans:
        span.numel_unpadded = size
    try:
        yield
    finally:
        for (span, _), size in zip(spans, before, strict=True):
            span.numel_unpadded = size


def _tensors(part: Mapping[str, Any]) -> dict[str, Any]:
    """Without Transformer Engine's `_extra_state`: the history of delayed FP8 scaling, a recipe that r1mega does not offer.

    It belongs to a module of a layout, so it would tie the checkpoint to that layout, and to Transformer Engine.
    """
    return {key: value for key, value in part.items() if not key.endswith("_extra_state")}
