"""The engines of a run, which outlive its stages: servers for a model of the same shapes are kept, and only given other weights."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from r1mega.rollout.engine import Engine

_MEANINGLESS = frozenset({"_name_or_path", "transformers_version", "dtype", "torch_dtype"})
"""Keys of config.json that an engine does not follow: the recipe says in which dtype it computes."""


class Engines:
    """Lends engines, one at a time to each borrower. Every rank has such a pool and calls it alike."""

    def __init__(self, make: Callable[[Path], "Engine"]) -> None:
        """`make` opens an engine for the model that a folder describes, without weights."""
        self._make = make
        self._waiting: dict[str, Engine] = {}

    @contextmanager
    def lent(self, model_dir: Path) -> Iterator["Engine"]:
        """An engine for the model that a folder describes, asleep: it has no weights until it is synced.

        One that waits for a borrower is taken where it was made for such a model; all others that wait are closed first, for their
        memory. One whose borrower fails is closed: nobody knows what it is at.
        """
        kind = kind_of(model_dir)
        engine = self._waiting.pop(kind, None)
        self.close()
        engine = self._make(model_dir) if engine is None else engine
        try:
            yield engine
        except BaseException:
            engine.close()
            raise
        if kind in self._waiting:
            engine.close()
            return
        engine.sleep()
        self._waiting[kind] = engine

    def close(self) -> None:
        """Close all engines that wait."""
        while self._waiting:
            self._waiting.popitem()[1].close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()


def kind_of(model_dir: Path) -> str:
    """What two folders have in common where the engine of one serves the other: shapes, and the tokens that end a sequence."""
    config = json.loads((model_dir / "config.json").read_text(encoding="utf-8"))
    generation = model_dir / "generation_config.json"
    return json.dumps(
        [
            {key: value for key, value in config.items() if key not in _MEANINGLESS},
            # SGLang ends a sequence at the tokens that are named there, too.
            json.loads(generation.read_text(encoding="utf-8")).get("eos_token_id") if generation.is_file() else None,
        ],
        sort_keys=True,
    )
