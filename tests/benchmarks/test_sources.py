"""Published benchmarks as prompts: schemas, wording, files of every kind, and rows without their fields."""

import csv
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from r1mega.config.prompts import PromptSet
from r1mega.data.prompts import Prompt
from r1mega.data.sources import load_prompts
from r1mega.errors import UserError

DIRECTIVE = r"Please reason step by step, and put your final answer within \boxed{}."

AIME = {"id": 60, "problem": "How many? ", "solution": "3.", "answer": "025", "url": "u", "year": "2024"}
OTHER_AIME = {"ID": "2024-I-1", "Problem": "How many?", "Solution": "3.", "Answer": 25}
MATH = {
    **{"problem": "What is $1/2$?", "solution": r"$\boxed{\frac{1}{2}}$", "answer": r"\frac{1}{2}"},
    **{"subject": "Algebra", "level": 2, "unique_id": "test/algebra/1.json"},
}
GPQA = {
    **{"Question": "Which gas?\n", "Correct Answer": "Helium", "Record ID": "rec", "High-level domain": "Chemistry"},
    **{"Incorrect Answer 1": "Neon ", "Incorrect Answer 2": "Argon", "Incorrect Answer 3": "Xenon", "Subdomain": None},
}
IFEVAL = {
    **{"key": 1000, "prompt": "Write, but without commas, 3 words or more."},
    **{"instruction_id_list": ["punctuation:no_comma", "length_constraints:number_words"]},
    "kwargs": [{"num_words": None, "relation": None}, {"num_words": 3, "relation": "at least"}],
}
ROWS: dict[str, dict[str, Any]] = {"aime_2024": AIME, "math_500": MATH, "gpqa_diamond": GPQA, "ifeval": IFEVAL}


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def load(path: Path, name: str, **source: Any) -> list[Prompt]:
    fields = {"source": {"kind": "benchmark", "name": name, "path": str(path), **source}, "split": "all"}
    return load_prompts(PromptSet.model_validate(fields), Path())


def test_aime_in_both_spellings(tmp_path: Path) -> None:
    first, second = (load(write(tmp_path / f"{i}.jsonl", row), "aime_2024")[0] for i, row in enumerate((AIME, OTHER_AIME)))
    assert (first.id, first.text, first.answer) == ("aime_2024/60", f"How many?\n{DIRECTIVE}", "025")
    assert (second.id, second.text, second.answer) == ("aime_2024/2024-I-1", first.text, "25")
    assert first.history == ()  # no system message


def test_math(tmp_path: Path) -> None:
    (prompt,) = load(write(tmp_path / "a.jsonl", MATH), "math_500")
    assert (prompt.text, prompt.answer) == (f"What is $1/2$?\n{DIRECTIVE}", r"\frac{1}{2}")
    assert (prompt.id, prompt.meta) == ("math_500/test/algebra/1.json", {"subject": "Algebra", "level": "2"})


def test_gpqa_shows_the_choices_in_an_order_of_their_own(tmp_path: Path) -> None:
    (prompt,) = load(write(tmp_path / "a.jsonl", GPQA), "gpqa_diamond")
    asked, question, choices = prompt.text.split("\n\n")
    assert asked.endswith("'Answer: $LETTER' (without quotes) where LETTER is one of ABCD. Think step by step before answering.")
    assert question == "Which gas?"
    lines = choices.split("\n")
    assert sorted(lines) == lines and sorted(line[3:] for line in lines) == ["Argon", "Helium", "Neon", "Xenon"]
    assert f"{prompt.answer}) Helium" in lines
    # Neither the order of the wrong answers nor that of the file matters.
    moved = GPQA | {"Incorrect Answer 1": "Xenon", "Incorrect Answer 3": "Neon"}
    assert load(write(tmp_path / "b.jsonl", GPQA | {"Question": "Other?"}, moved), "gpqa_diamond")[1] == prompt
    rows = [GPQA | {"Question": f"Which gas is number {i}?"} for i in range(400)]
    letters = Counter(prompt.answer for prompt in load(write(tmp_path / "c.jsonl", *rows), "gpqa_diamond"))
    assert set(letters) == set("ABCD") and min(letters.values()) > 70


def test_ifeval_keeps_the_arguments_that_are_given(tmp_path: Path) -> None:
    (prompt,) = load(write(tmp_path / "a.jsonl", IFEVAL), "ifeval")
    assert (prompt.id, prompt.text, prompt.answer) == ("ifeval/1000", IFEVAL["prompt"], None)
    expected = [["punctuation:no_comma", {}], ["length_constraints:number_words", {"num_words": 3, "relation": "at least"}]]
    assert prompt.meta == {"instructions": expected}


@pytest.mark.parametrize("name", ROWS)
def test_every_kind_of_file_gives_the_same_prompts(tmp_path: Path, name: str) -> None:
    from datasets import Dataset, DatasetDict

    rows = [ROWS[name]]
    expected = load(write(tmp_path / "rows.jsonl", *rows), name)
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    Dataset.from_list(rows).save_to_disk(str(tmp_path / "one"))
    DatasetDict({"test": Dataset.from_list(rows)}).save_to_disk(str(tmp_path / "only"))
    DatasetDict({"test": Dataset.from_list(rows), "train": Dataset.from_list(rows)}).save_to_disk(str(tmp_path / "two"))
    (tmp_path / "shards").mkdir()
    write(tmp_path / "shards" / "test-1.jsonl", *rows)
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "shards" / "test-2.parquet")
    for path in ("rows.parquet", "one", "only", "shards"):
        assert load(tmp_path / path, name) == expected, path
    assert load(tmp_path / "two", name, split="train") == expected
    with pytest.raises(UserError, match="name a split; it has test, train"):
        load(tmp_path / "two", name)
    if name != "ifeval":  # whose cells are lists
        with (tmp_path / "rows.csv").open("w", newline="") as file:
            table = csv.DictWriter(file, list(rows[0]))
            table.writeheader()
            table.writerows(rows)
        assert load(tmp_path / "rows.csv", name) == expected


@pytest.mark.parametrize(
    ("name", "field", "value", "message"),
    [
        ("aime_2024", "problem", None, "no field 'problem' or 'Problem'; the row has 'id', 'problem'"),
        ("aime_2024", "answer", [1], r"field 'answer': expected a string or a number, got \[1\]"),
        ("math_500", "unique_id", None, "no field 'unique_id'"),
        ("math_500", "problem", " ", "field 'problem': expected text, got ' '"),
        ("gpqa_diamond", "Incorrect Answer 2", None, "no field 'Incorrect Answer 2'"),
        ("ifeval", "kwargs", [{}], "expected one element for each of the 2 instructions, got 1"),
        ("ifeval", "kwargs", [{}, {"num_words": 3}], "length_constraints:number_words needs 'relation', got None"),
        ("ifeval", "kwargs", [{}, {"num_words": "3", "relation": "at least"}], "needs 'num_words', got '3'"),
        ("ifeval", "instruction_id_list", ["punctuation:no_comma", "punctuation:none"], "no instruction is called 'punctuation:none'"),
        ("ifeval", "instruction_id_list", "punctuation:no_comma", "expected a list of str"),
    ],
)
def test_a_row_without_its_fields_names_file_and_line(tmp_path: Path, name: str, field: str, value: Any, message: str) -> None:
    path = write(tmp_path / "a.jsonl", ROWS[name], ROWS[name] | {field: value})
    with pytest.raises(UserError, match=message) as error:
        load(path, name)
    assert str(error.value).startswith(f"{path}:2: ") and "\n" not in str(error.value)


def test_paths_that_hold_no_table(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "empty").mkdir()
    write(tmp_path / "none.jsonl")
    for path, message in [
        ("a.txt", "expected a file that ends in .jsonl, .parquet, .csv, or a folder"),
        ("empty", "a folder without a file that ends in .jsonl"),
        ("gone.jsonl", "no file "),
        ("none.jsonl", "no rows"),
    ]:
        with pytest.raises(UserError, match=message):
            load(tmp_path / path, "aime_2024")


def test_a_window_of_contests_is_livecodebenchs() -> None:
    source = {"kind": "benchmark", "path": "x"}
    for fields, message in [
        ({"name": "aime_2024", "first_day": "2024-08-01"}, "aime_2024 has no contests' days"),
        ({"name": "livecodebench", "last_day": "August"}, "expected a day such as 2024-08-01, got 'August'"),
    ]:
        with pytest.raises(ValueError, match=message):
            PromptSet.model_validate({"source": source | fields})
