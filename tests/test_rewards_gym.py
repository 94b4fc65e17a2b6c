"""reasoning-gym's problems and scorers through their adapter."""

import json
from pathlib import Path

import pytest

from r1mega.config.prompts import PromptSet
from r1mega.data.sources import load_prompts
from r1mega.errors import UserError
from r1mega.rewards import gym

reasoning_gym = pytest.importorskip("reasoning_gym")


def prompt_set(task: str, **fields: object) -> PromptSet:
    return PromptSet.model_validate({"split": "all", "source": {"kind": "reasoning_gym", "task": task, **fields}})


# The metadata of these holds, in turn: plain values, tuples, NumPy's strings, tuples again, no single right answer, another task's problem.
COMPOSITE = {"datasets": [{"name": "leg_counting", "weight": 1, "config": {"max_animals": 4}}]}
TASKS = [("chain_sum", {}), ("rearc", {}), ("knights_knaves", {}), ("arc_1d", {}), ("graph_color", {}), ("composite", COMPOSITE)]


@pytest.mark.parametrize(("task", "options"), TASKS)
def test_scores_are_the_tasks_own(task: str, options: dict[str, object]) -> None:
    from reasoning_gym.composite import DatasetSpec

    settings = {"datasets": [DatasetSpec(**spec) for spec in COMPOSITE["datasets"]]} if options else {}
    dataset = reasoning_gym.create_dataset(task, size=3, seed=7, **settings)
    prompts = load_prompts(prompt_set(task, size=3, seed=7, options=options), base=Path())
    assert len(prompts) == 3
    for index, prompt in enumerate(prompts):
        entry = dataset[index]
        assert prompt.text == entry["question"]
        assert prompt.answer == entry["answer"]
        assert json.loads(json.dumps(prompt.meta)) == prompt.meta
        for answer in {str(entry["answer"]), "1", "[[1, 2], [3, 4]]", "nothing"}:
            assert gym.accuracy(prompt, f"<think> 0 </think> <answer>{answer}</answer>") == dataset.score_answer(answer, entry)
        assert gym.accuracy(prompt, f"<think> {entry['answer']} </think>") == 0.0


def test_a_right_answer_scores_one() -> None:
    for prompt in load_prompts(prompt_set("chain_sum", size=20, seed=1), base=Path()):
        assert gym.accuracy(prompt, f"<answer> {prompt.answer} </answer>") == 1.0
        assert gym.accuracy(prompt, f"it is \\boxed{{{prompt.answer}}}") == 1.0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"task": "chain_sums"}, "reasoning-gym has no task 'chain_sums'; the nearest are chain_sum"),
        ({"task": "chain_sum", "options": {"terms": 3}}, "reasoning-gym task 'chain_sum' refuses its options {\"terms\": 3}: "),
        ({"task": "chain_sum", "options": {"min_terms": -1}}, "refuses its options"),
        ({"task": "composite"}, "refuses its options {}: Must specify at least one dataset"),
    ],
)
def test_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(UserError) as error:
        load_prompts(prompt_set(**fields), base=Path())
    assert message in str(error.value)
    assert "\n" not in str(error.value)
