"""Which engine a run's next stage is lent."""

import json
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from r1mega.rollout.pool import Engines


@dataclass(eq=False)
class Fake:
    model: str
    calls: list[str] = field(default_factory=list)

    def sleep(self) -> None:
        self.calls.append("sleep")

    def close(self) -> None:
        self.calls.append("close")


@pytest.fixture
def made() -> list[Fake]:
    return []


@pytest.fixture
def engines(made: list[Fake]) -> Engines:
    def make(model_dir: Path) -> Fake:
        assert all("close" in other.calls or "sleep" not in other.calls for other in made), "nothing waits while another is started"
        made.append(Fake(model_dir.name))
        return made[-1]

    return Engines(make)


def folder(path: Path, eos: int | None = None, **config: object) -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"hidden_size": 64, "eos_token_id": 2} | config))
    if eos is not None:
        (path / "generation_config.json").write_text(json.dumps({"eos_token_id": eos, "temperature": 0.6}))
    return path


def test_the_next_model_of_the_same_shapes_gets_the_same_engine_asleep(tmp_path, engines, made):
    with engines.lent(folder(tmp_path / "base", torch_dtype="float32")) as first:
        assert first.calls == []
    assert first.calls == ["sleep"]
    with engines.lent(folder(tmp_path / "trained", dtype="bfloat16", transformers_version="5.1", _name_or_path="x")) as second:
        assert second is first
    engines.close()
    assert first.calls == ["sleep", "sleep", "close"]
    assert len(made) == 1


@pytest.mark.parametrize("changed", [{"hidden_size": 128}, {"eos_token_id": 3}, {"eos": 3}])
def test_another_model_ends_the_old_engine_first(tmp_path, engines, made, changed):
    with engines.lent(folder(tmp_path / "base")):
        pass
    with engines.lent(folder(tmp_path / "other", **changed)):
        assert made[0].calls == ["sleep", "close"]
    assert len(made) == 2


def test_two_at_a_time_are_two_engines_of_which_one_is_kept(tmp_path, engines, made):
    base = folder(tmp_path / "base")
    with engines.lent(base) as teacher, engines.lent(base) as student:
        assert teacher is not student
    assert [one.calls for one in made] == [["close"], ["sleep"]]
    engines.close()
    assert made[1].calls == ["sleep", "close"]


def test_an_engine_whose_borrower_failed_is_closed(tmp_path, engines, made):
    base = folder(tmp_path / "base")
    with pytest.raises(ArithmeticError), engines.lent(base):
        raise ArithmeticError
    assert made[0].calls == ["close"]
    with engines.lent(base) as other:
        assert other is made[1]
