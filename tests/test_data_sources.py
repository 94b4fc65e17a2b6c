"""Prompt sources: what they read, how they divide, what they refuse."""

import datetime
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from r1mega.config.prompts import PromptSet
from r1mega.data.prompts import Message, Prompt
from r1mega.data.sources import load_prompts
from r1mega.data.split import is_heldout, normalised
from r1mega.errors import UserError

ROWS = [{"prompt": f"What is {i} + {i}?", "answer": 2 * i, "level": i % 3} for i in range(300)]


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def load(base: Path, kind: str, side: str = "all", limit: int | None = None, heldout_fraction: float = 0.1, **source: Any) -> list[Prompt]:
    fields = {"source": {"kind": kind, **source}, "split": side, "limit": limit, "heldout_fraction": heldout_fraction}
    return load_prompts(PromptSet.model_validate(fields), base)


def texts(prompts: list[Prompt]) -> list[str]:
    return [prompt.text for prompt in prompts]


# ---------------------------------------------------------------- kinds


def test_jsonl(tmp_path: Path) -> None:
    write(tmp_path / "sums.jsonl", ROWS)
    prompts = load(tmp_path, "jsonl", path="sums.jsonl")
    assert texts(prompts) == [row["prompt"] for row in ROWS]
    assert [prompt.answer for prompt in prompts] == [str(2 * i) for i in range(300)]
    assert prompts[4].meta == {"level": 1}
    assert load(Path("/"), "jsonl", path=str(tmp_path / "sums.jsonl")) == prompts


def test_jsonl_details(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes('\ufeff{"q": "é\u2028 ?", "a": null}\r\n\n  \n{"q": "2?", "a": 0.5}'.encode())
    assert [(prompt.text, prompt.answer) for prompt in load(tmp_path, "jsonl", path="a.jsonl", prompt="q", answer="a")] == [
        ("é\u2028 ?", None),
        ("2?", "0.5"),
    ]


def test_parquet_is_the_same_as_jsonl(tmp_path: Path) -> None:
    write(tmp_path / "sums.jsonl", ROWS)
    parquet.write_table(pa.Table.from_pylist(ROWS), tmp_path / "sums.parquet", row_group_size=7)
    assert load(tmp_path, "parquet", path="sums.parquet") == load(tmp_path, "jsonl", path="sums.jsonl")


def test_dataset_on_disk_is_the_same_as_jsonl(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    write(tmp_path / "sums.jsonl", ROWS)
    Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "one" / "sums"))
    DatasetDict({"a": Dataset.from_list(ROWS[:10]), "b": Dataset.from_list(ROWS)}).save_to_disk(str(tmp_path / "two" / "sums"))
    expected = load(tmp_path, "jsonl", path="sums.jsonl")
    assert load(tmp_path, "dataset", path="one/sums") == expected
    assert load(tmp_path, "dataset", path="two/sums", split="b") == expected
    for fields, message in [
        ({"path": "two/sums"}, "name a split; it has a, b"),
        ({"path": "two/sums", "split": "c"}, "no split 'c'; it has a, b"),
        ({"path": "one/sums", "split": "a"}, "holds one dataset without splits; leave out split='a'"),
        ({"path": "three"}, "no dataset in "),
        ({"path": "."}, "no dataset in "),
    ]:
        with pytest.raises(UserError, match=message):
            load(tmp_path, "dataset", **fields)


def test_meta_holds_json_values_only(tmp_path: Path) -> None:
    row = {"prompt": "q", "day": datetime.date(2025, 1, 1), "raw": b"x", "tests": [{"in": "1", "out": [1, None]}], "score": 0.5}
    parquet.write_table(pa.Table.from_pylist([row]), tmp_path / "a.parquet")
    (prompt,) = load(tmp_path, "parquet", path="a.parquet")
    assert prompt.meta == {"tests": row["tests"], "score": 0.5}
    assert prompt.answer is None


def test_chat_messages(tmp_path: Path) -> None:
    turns = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "1 + 1?"}]
    rows = [{"prompt": turns}, {"prompt": turns[1:]}, {"prompt": "1 + 1?"}]
    write(tmp_path / "a.jsonl", rows)
    first, second = load(tmp_path, "jsonl", path="a.jsonl")  # the third is the second again
    assert (first.history, first.text) == ((Message("system", "be kind"),), "1 + 1?")
    assert (second.history, second.text) == ((), "1 + 1?")
    assert first.id != second.id
    parquet.write_table(pa.Table.from_pylist(rows[:2]), tmp_path / "a.parquet")
    assert load(tmp_path, "parquet", path="a.parquet") == [first, second]


def test_tiny(tmp_path: Path) -> None:
    prompts = load(tmp_path, "tiny", task="running_sum", size=500, seed=3)
    assert len(prompts) == len(set(texts(prompts))) == 500
    assert prompts == load(tmp_path, "tiny", task="running_sum", size=500, seed=3)
    assert texts(prompts) != texts(load(tmp_path, "tiny", task="running_sum", size=500, seed=4))


# ---------------------------------------------------------------- split, duplicates, ids


@settings(max_examples=40)
@given(st.integers(0, 5), st.integers(0, 5), st.integers(200, 3_000), st.integers(200, 3_000), st.floats(0.02, 0.9))
def test_train_and_heldout_share_nothing_whatever_was_drawn(seed: int, other: int, size: int, other_size: int, fraction: float) -> None:
    train = load(Path(), "tiny", "train", task="running_sum", size=size, seed=seed, heldout_fraction=fraction)
    heldout = load(Path(), "tiny", "heldout", task="running_sum", size=other_size, seed=other, heldout_fraction=fraction)
    assert not {normalised(text) for text in texts(train)} & {normalised(text) for text in texts(heldout)}
    assert not {prompt.id for prompt in train} & {prompt.id for prompt in heldout}
    assert not any(is_heldout(text, fraction) for text in texts(train))
    assert all(is_heldout(text, fraction) for text in texts(heldout))


@settings(max_examples=300)
@given(st.text(min_size=1), st.sampled_from([" ", "\n", "\u3000 "]), st.floats(0, 0.99))
def test_spelling_does_not_change_the_side(text: str, space: str, fraction: float) -> None:
    import unicodedata

    for other in (f"{space}{text}{space}", text.replace(" ", space), unicodedata.normalize("NFC", text), text.casefold()):
        assert is_heldout(other, fraction) == is_heldout(text, fraction)


def test_sides_make_up_the_whole(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", ROWS)
    sides = [texts(load(tmp_path, "jsonl", split, path="a.jsonl", heldout_fraction=0.3)) for split in ("train", "heldout")]
    assert sorted(sides[0] + sides[1]) == sorted(row["prompt"] for row in ROWS)
    assert 60 < len(sides[1]) < 120
    assert len(load(tmp_path, "jsonl", "train", path="a.jsonl", heldout_fraction=0.0)) == 300


def test_a_question_is_on_one_side_whatever_was_said_before_it(tmp_path: Path) -> None:
    question = {"role": "user", "content": "1 + 1?"}
    write(tmp_path / "a.jsonl", [{"prompt": [{"role": "system", "content": f"you are {i}"}, question]} for i in range(50)])
    sizes = []
    for split in ("train", "heldout"):
        try:
            sizes.append(len(load(tmp_path, "jsonl", split, path="a.jsonl", heldout_fraction=0.5)))
        except UserError:
            sizes.append(0)
    assert sorted(sizes) == [0, 50]


def test_duplicates_keep_the_first(tmp_path: Path) -> None:
    rows = [("a b", 1), ("c", 2), ("A  b\n", 3), ("c", 4), ("e\u0301", 5), ("é", 6)]
    write(tmp_path / "a.jsonl", [{"prompt": text, "answer": answer} for text, answer in rows])
    assert [(prompt.text, prompt.answer) for prompt in load(tmp_path, "jsonl", path="a.jsonl")] == [
        ("a b", "1"),
        ("c", "2"),
        ("e\u0301", "5"),
    ]


def test_ids_do_not_move_with_rows(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", ROWS)
    ids = {prompt.text: prompt.id for prompt in load(tmp_path, "jsonl", path="a.jsonl")}
    assert len(set(ids.values())) == len(ROWS)
    assert ids["What is 4 + 4?"] == "a/e586169d6950c5f3"  # a ledger written today must be readable tomorrow
    write(tmp_path / "a.jsonl", [{"prompt": "new", "answer": 0}, *reversed(ROWS)])
    assert {prompt.text: prompt.id for prompt in load(tmp_path, "jsonl", path="a.jsonl")} == ids | {
        "new": load(tmp_path, "jsonl", path="a.jsonl", limit=1)[0].id
    }


def test_limit_comes_after_the_split(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", ROWS)
    assert load(tmp_path, "jsonl", "heldout", 5, path="a.jsonl") == load(tmp_path, "jsonl", "heldout", path="a.jsonl")[:5]
    assert len(load(tmp_path, "jsonl", "heldout", 5_000, path="a.jsonl")) < 300


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "a.jsonl: no rows"),
        (b"\n  \n", "a.jsonl: no rows"),
        (b'{"prompt": "q"}\n{"prompt": "r"\n', "a.jsonl:2: not JSON: Expecting ',' delimiter"),
        (b'{"prompt": "q"}\n\n"r"\n', "a.jsonl:3: expected a JSON object, got str"),
        (b'{"prompt": "q"}\n{"prompt": "\xff"}\n', "a.jsonl:2: not UTF-8: invalid start byte at byte 12"),
        (b'{"prompt": "q"}\n{"question": "r", "answer": "s"}\n', "a.jsonl:2: no field 'prompt'; the row has 'question', 'answer'"),
        (b"{}\n", "a.jsonl:1: no field 'prompt'; the row has no fields"),
        (b'{"prompt": null}\n', "a.jsonl:1: no field 'prompt'"),
        (b'{"prompt": " \\n"}\n', "a.jsonl:1: field 'prompt': empty text"),
        (b'{"prompt": "\\ud800"}\n', "a.jsonl:1: field 'prompt': not Unicode: surrogates not allowed at character 0"),
        (b'{"prompt": 3}\n', "a.jsonl:1: field 'prompt': expected a string or a list of chat messages, got 3"),
        (b'{"prompt": []}\n', "a.jsonl:1: field 'prompt': expected a string or a list of chat messages, got []"),
        (b'{"prompt": ["q"]}\n', "a chat message is {'role': ..., 'content': ...} with two strings, got 'q'"),
        (b'{"prompt": [{"role": "user", "content": [1]}]}\n', "a chat message is {'role': ..., 'content': ...} with two strings"),
        (b'{"prompt": [{"role": "assistant", "content": "q"}]}\n', "the last chat message is the user's question, got role 'assistant'"),
        (
            b'{"prompt": "q", "answer": null}\n{"prompt": "r"}\n',
            "a.jsonl:2: no field 'answer', which other rows have; add it, null where there is no answer",
        ),
        (b'{"prompt": "q", "answer": ["a"]}\n', "a.jsonl:1: field 'answer': a reference answer is a string or a number, got ['a']"),
        (b'{"prompt": "q", "answer": true}\n', "a.jsonl:1: field 'answer': a reference answer is a string or a number, got True"),
        (b"[" * 100_000, "a.jsonl:1: not JSON: "),
    ],
)
def test_refused_lines(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(UserError) as error:
        load(tmp_path, "jsonl", path="a.jsonl")
    assert message in str(error.value)
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


def test_refused_files(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_text("no")
    write(tmp_path / "a.jsonl", ROWS[:3])
    parquet.write_table(pa.Table.from_pylist([{"question": "q"}]), tmp_path / "b.parquet")
    parquet.write_table(pa.table({"prompt": pa.array([], pa.string())}), tmp_path / "empty.parquet")
    for kind, fields, message in [
        ("jsonl", {"path": "b.jsonl"}, "no file "),
        ("jsonl", {"path": "."}, "no file "),
        ("parquet", {"path": "c.parquet"}, "no file "),
        ("parquet", {"path": "a.parquet"}, "a.parquet: not a Parquet file: "),
        ("parquet", {"path": "b.parquet"}, r"b.parquet, row 1: no field 'prompt'; the row has 'question'"),
        ("parquet", {"path": "empty.parquet"}, "empty.parquet: no rows"),
        ("jsonl", {"path": "a.jsonl", "answer": "solution"}, "a.jsonl: no row has the answer field 'solution'"),
        (
            "jsonl",
            {"path": "a.jsonl", "side": "heldout", "heldout_fraction": 0.0},
            r"a: none of its 3 questions is on the 'heldout' side of heldout_fraction=0; add questions or change the fraction",
        ),
    ]:
        with pytest.raises(UserError, match=message):
            load(tmp_path, kind, **fields)
