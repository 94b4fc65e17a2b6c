"""A Hugging Face model folder: what a stage starts from and what it leaves behind."""

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from r1mega.config.engine_layout import EngineLayout
from r1mega.errors import UserError
from r1mega.pipeline import files
from r1mega.weights.architecture import Architecture, read_config
from r1mega.weights.boxes import Box
from r1mega.weights.canonical import canonical
from r1mega.weights.safetensors_in import Reader
from r1mega.weights.safetensors_out import Encoding, copy_side_files, save
from r1mega.weights.source import Filled, Parcels, Room, Whole
from r1mega.weights.wire import Wire


class ModelFolder:
    """Configuration, tokenizer and weights of one language model. A `WeightSource`.

    Raises:
        UserError: config.json, the tokenizer or a weight is missing or does not fit the others.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config: dict[str, Any] = read_config(path)
        self.arch = Architecture.from_hf(self.config)
        if self.arch.head == "score":
            raise UserError(f"{path}: a reward model, which scores text and writes none; name a language model here")

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The folder's tokenizer; it must not know more tokens than the embedding has rows."""
        if not (self.path / "tokenizer.json").is_file() and not (self.path / "tokenizer_config.json").is_file():
            raise UserError(f"{self.path}: no tokenizer.json; copy the tokenizer's files beside config.json")
        try:
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(self.path, trust_remote_code=False, local_files_only=True)
        except Exception as error:  # noqa: BLE001 - tokenizers raises a bare Exception for a file that it cannot parse
            raise UserError(f"{self.path}: its tokenizer cannot be loaded ({' '.join(str(error).split()):.200})") from None
        if len(tokenizer) > self.arch.vocab:
            raise UserError(
                f"{self.path}: the tokenizer has {len(tokenizer)} tokens, the embedding only {self.arch.vocab} rows (vocab_size)"
            )
        return tokenizer

    @cached_property
    def tokenizer_digest(self) -> str:
        """SHA-256 of tokenizer.json: equal digests, equal token ids."""
        return files.file_digest(self.path / "tokenizer.json")

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """Tokens that end a response: the tokenizer's EOS and those of config.json."""
        listed = self.config.get("eos_token_id")
        found = {self.tokenizer.eos_token_id, *(listed if isinstance(listed, list) else [listed])}
        return tuple(sorted(token for token in found if token is not None))

    def prompt_room(self, max_new_tokens: float) -> int:
        """Tokens that the context leaves for a prompt beside a response of this length; UserError when it leaves none."""
        room = self.arch.max_positions - int(max_new_tokens)
        if room < 1:
            raise UserError(
                f"sampling.max_new_tokens={int(max_new_tokens)} leaves no room for prompts in the context of {self.arch.max_positions} "
                f"tokens (max_position_embeddings of {self.path})"
            )
        return room

    def open(self) -> Reader:
        """The weights, after a check that all are there in the shapes that config.json implies."""
        reader = Reader(self.path)
        reader.check(canonical(self.arch))
        return reader

    def tensors(self, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        """Every canonical tensor in the dtype of the files (`WeightSource`)."""
        with self.open() as reader:
            yield from reader.tensors(self.arch)

    def buckets(self, wire: Wire, limit: int, senders: Sequence[int] | None, rank: int, room: Room | None = None) -> Filled:
        """The tensors in buckets (`WeightSource`)."""
        with self.open() as reader:
            yield from Whole(self.arch, reader.read).buckets(wire, limit, rank, room)

    def params(
        self, engine: EngineLayout, engine_rank: int, wire: Wire, limit: int, on: int, rank: int, room: Room | None = None
    ) -> Filled:
        """An engine rank's parameters (`WeightSource`)."""
        with self.open() as reader:
            yield from Whole(self.arch, reader.read).params(engine, engine_rank, wire, limit, on, rank, room)

    def parcels(self, engine: EngineLayout, engine_rank: int, wire: Wire, limit: int, rank: int) -> Parcels:
        """What a rank gives to an engine rank's parameters (`WeightSource`)."""
        with self.open() as reader:
            yield from Whole(self.arch, reader.read).parcels(engine, engine_rank, wire, limit, rank)

    def write(self, target: Path, values: Mapping[str, Tensor], dtype: torch.dtype) -> None:
        """A copy of this folder with new weights. Tensors that `values` lacks (an untrained MTP layer) are taken over from here.

        Args:
            target: an existing empty folder.
            values: canonical tensors by name.
            dtype: dtype of the files; what checkpoints keep in float32 stays so.
        """
        copy_side_files(self.path, target, Encoding(dtype))
        wanted = [tensor for tensor in canonical(self.arch) if tensor.copy_of is None]
        untouched = [tensor for tensor in wanted if tensor.name not in values]
        if untouched:
            with self.open() as reader:
                values = {**values, **{tensor.name: reader.read(tensor.name, Box.whole(tensor.shape)) for tensor in untouched}}
        save(target, self.arch, values, Encoding(dtype))


def check_same_tokens(student: ModelFolder, teacher: ModelFolder) -> None:
    """UserError unless both give the same meaning to token ids."""
    if student.tokenizer_digest != teacher.tokenizer_digest:
        raise UserError(
            f"the student {student.path} and the teacher {teacher.path} have different tokenizers, and distributions are compared token "
            "by token; take a teacher with the student's tokenizer.json, or train on its answers (rejection, sft)"
        )
