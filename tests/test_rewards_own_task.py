"""The example of a user's own task: its recipe loads, its prompts encode, its reward is judged."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from r1mega.config.loading import load_recipe
from r1mega.config.stages import Grpo
from r1mega.data.prompts import Prompt
from r1mega.data.sources import load_prompts
from r1mega.data.templates import encode
from r1mega.data.tiny.tokenizer import build_tokenizer
from r1mega.rewards.judge import Judge

EXAMPLE = Path(__file__).parents[1] / "examples" / "own_task"


@pytest.fixture(scope="module")
def stage() -> Grpo:
    stage = load_recipe(EXAMPLE / "recipe.yaml").stages["zero"]
    assert isinstance(stage, Grpo)
    return stage


@pytest.fixture(scope="module")
def judge(stage: Grpo) -> Iterator[Judge]:
    with Judge(stage.rewards, workers=1, search_path=[EXAMPLE]) as judge:
        yield judge


def test_its_prompts(stage: Grpo) -> None:
    assert stage.evaluation
    train = load_prompts(stage.prompts["sums"], EXAMPLE)
    heldout = load_prompts(stage.evaluation.suites["heldout"].prompts, EXAMPLE)
    assert len(train) + len(heldout) == 400 and len(train) >= stage.prompts_per_rollout
    assert {len(ids) for ids in encode(train + heldout, stage.prompts["sums"].template, build_tokenizer(), limit=32)} == {14}
    for prompt in train + heldout:
        digits = [int(word) for word in prompt.text.split() if word.isdigit()]
        assert prompt.answer == str(sum(digits) % 10) and prompt.meta == {"speak": "en"}


@pytest.mark.parametrize(
    ("response", "reward"),
    [
        ("<think> so 3 so 4 wait 5 </think> <answer> 5 </answer>", 1.0),
        ("<think> so 3 ze 4 </think> <answer> 5 </answer>", 0.75),
        ("<think> ze 3 deng 4 </think> <answer> 5 </answer>", 0.5),
        ("<answer> 5 </answer>", 0.5),
        ("<think> so 3 so 4 </think> <answer> 4 </answer>", 0.0),
        ("<think> so 3 so 5", 0.0),
    ],
)
def test_its_reward(judge: Judge, response: str, reward: float) -> None:
    prompt = Prompt("p", "zh 5 :", answer="5", meta={"speak": "en"})
    assert judge.judge([(prompt, response)])[0]["task"].value == reward


def test_it_is_short() -> None:
    assert all(len((EXAMPLE / name).read_text().splitlines()) < 40 for name in ("my_task.py", "recipe.yaml", "README.md"))
