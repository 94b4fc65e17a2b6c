from pathlib import Path

import pytest

from r1mega.data.token_store import TokenStore, write_part

SEQUENCES = [(row, list(range(row, row + 3 + row % 4)), [False, *[True] * (2 + row % 4)]) for row in (0, 1, 1, 2, 3, 5, 6, 6, 6, 8)]


@pytest.mark.parametrize("parts", [1, 2, 3, 12])
def test_the_order_is_that_of_the_rows_whatever_the_number_of_ranks(tmp_path: Path, parts: int) -> None:
    for part in range(parts):
        write_part(tmp_path, part, [one for one in SEQUENCES if one[0] % parts == part])
    store = TokenStore(tmp_path, parts)
    assert len(store) == len(SEQUENCES)
    for place, (_, ids, learnt) in enumerate(SEQUENCES):
        tokens, flags = store[place]
        assert tokens.tolist() == ids and flags.tolist() == learnt


def test_an_interrupted_part_is_written_anew(tmp_path: Path) -> None:
    write_part(tmp_path, 0, SEQUENCES)
    write_part(tmp_path, 0, SEQUENCES[:2])
    assert len(TokenStore(tmp_path, 1)) == 2
