"""Rows of whatever a data set was downloaded as: JSON lines, Parquet, CSV, a folder of them, or one that `datasets` saved."""

import csv
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Final

from r1mega.data.rows import Row, jsonl, parquet, saved_dataset
from r1mega.errors import UserError

_LARGEST_CELL = 1 << 30
_SAVED = ("dataset_dict.json", "state.json")


def read(path: Path, split: str | None = None) -> Iterator[Row]:
    """Every row, with the place where it stands; `split` is for saved folders that hold several.

    Files of a folder are read in the order of their names. Raises UserError for a path that holds no table.
    """
    if not path.is_dir():
        if path.suffix not in _READERS:
            raise UserError(f"{path}: expected a file that ends in {', '.join(_READERS)}, or a folder")
        return _READERS[path.suffix](path)
    if any((path / name).is_file() for name in _SAVED):
        return saved_dataset(path, _split(path) if split is None else split)
    files = sorted(file for file in path.iterdir() if file.suffix in _READERS)
    if not files:
        raise UserError(f"{path}: a folder without a file that ends in {', '.join(_READERS)}, and not one of Dataset.save_to_disk")
    return (row for file in files for row in _READERS[file.suffix](file))


def _csv(path: Path) -> Iterator[Row]:
    if not path.is_file():
        raise UserError(f"no file {path}")
    csv.field_size_limit(_LARGEST_CELL)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            for row in reader:
                yield f"{path}:{reader.line_num}", row
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a CSV file in UTF-8: {error}") from None


def _split(path: Path) -> str | None:
    """The name of the only split, None where there are none or several."""
    names = path / "dataset_dict.json"
    splits = json.loads(names.read_text()).get("splits", []) if names.is_file() else []
    return str(splits[0]) if len(splits) == 1 else None


_READERS: Final[Mapping[str, Callable[[Path], Iterator[Row]]]] = {".jsonl": jsonl, ".parquet": parquet, ".csv": _csv}
