"""Fields of a row that somebody else published: there, of their type, or one line that says where they are not."""

import math
from collections.abc import Mapping
from typing import Any

from r1mega.errors import UserError


def text(row: Mapping[str, Any], where: str, *names: str) -> str:
    """The first of the named fields that the row has, a string that is not blank; UserError, naming `where`, without one."""
    name = present(row, where, *names)
    value = row[name]
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{where}: field {name!r}: expected text, got {value!r:.60}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: field {name!r}: not Unicode: {error.reason} at character {error.start}") from None
    return value


def scalar(row: Mapping[str, Any], where: str, *names: str) -> str:
    """As `text`, of a field that holds a string or a number."""
    name = present(row, where, *names)
    value = row[name]
    if isinstance(value, bool) or not isinstance(value, str | int | float) or not str(value).strip():
        raise UserError(f"{where}: field {name!r}: expected a string or a number, got {value!r:.60}")
    return str(value)


def items(row: Mapping[str, Any], where: str, name: str, kind: type) -> list[Any]:
    """A field that holds a list of one type, which may be empty; UserError for anything else."""
    value = row[present(row, where, name)]
    if not isinstance(value, list) or not all(isinstance(item, kind) for item in value):
        raise UserError(f"{where}: field {name!r}: expected a list of {kind.__name__}, got {value!r:.60}")
    return value


def present(row: Mapping[str, Any], where: str, *names: str) -> str:
    """The first of the names whose field is neither absent, None nor NaN, as pandas writes a missing cell."""
    for name in names:
        value = row.get(name)
        if value is not None and not (isinstance(value, float) and math.isnan(value)):
            return name
    wanted = " or ".join(map(repr, names))
    raise UserError(f"{where}: no field {wanted}; the row has {', '.join(map(repr, row)) or 'no fields'}")
