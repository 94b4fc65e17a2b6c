from pathlib import Path

import pytest

from r1mega.config import suites, tree
from r1mega.config.base import Closed
from r1mega.config.explain import explain
from r1mega.config.loading import load_suite
from r1mega.config.schema import Recipe
from r1mega.errors import UserError


def test_a_key_prints_type_default_and_description() -> None:
    expected = "number or schedule; default 10.0\n  eps of the ratio clip on both sides; the R1 paper uses 10"
    assert explain("grpo.objective.clip") == f"grpo.objective.clip: {expected}"
    assert explain("stages.zero.objective.clip") == f"stages.zero.objective.clip: {expected}"


def test_a_class_lists_the_keys_below_it() -> None:
    assert "    kl_coef              number or schedule; default 0.001" in explain("grpo.objective").splitlines()
    assert "kind: grpo. Reinforcement learning" in explain("stages")
    assert explain("").startswith("A whole run")


def test_a_key_of_several_kinds_is_explained_for_each() -> None:
    text = explain("stages.any.model")
    assert "(kind: grpo): string; required" in text and "(kind: sft): string; required" in text


def test_pretraining_shows_its_own_defaults() -> None:
    assert explain("pretrain.train.mtp_loss").startswith("pretrain.train.mtp_loss: number >= 0; default 0.3")
    assert explain("grpo.train.mtp_loss").startswith("grpo.train.mtp_loss: number >= 0; default 0.0")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("grpo.clip", "no key 'grpo.clip'; the nearest known key is 'grpo.objective.clip'"),
        ("run.rank", "no key 'run.rank'; the nearest known key is 'run.ranks'"),
        ("grpo.updates.x", "no key 'grpo.updates.x'; 'grpo.updates' has no keys below it"),
        ("grpo.sampling.temperature.0", "'grpo.sampling.temperature' has no keys below it"),
    ],
)
def test_a_wrong_key_names_the_nearest(path: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        explain(path)
    assert message in str(error.value)


def every_class(annotation: object) -> set[type[Closed]]:
    found: set[type[Closed]] = set()
    for member in tree.classes(annotation) or tree.classes(tree.item(annotation)):
        found.add(member)
        for field in member.model_fields.values():
            found |= every_class(field.annotation)
    return found


def test_every_key_is_described_and_every_class_documented() -> None:
    classes = every_class(Recipe)
    assert len(classes) > 20
    for member in classes:
        assert member.__doc__, member
        for name, field in member.model_fields.items():
            is_class = tree.classes(field.annotation) and len(tree.classes(field.annotation)) == 1
            assert field.description or name == "kind" or is_class, f"{member.__name__}.{name} has no description"


def test_shipped_suites_load_and_unknown_ones_are_named() -> None:
    assert "running_sum" in suites.names()
    for name in suites.names():
        published = suites.shipped(name)["prompts"]["source"]["kind"] == "benchmark"
        assert load_suite(name, Path("rows.jsonl") if published else None).k >= 1
    with pytest.raises(UserError, match=r"no suite 'aime'; there are .*running_sum"):
        load_suite("aime")
