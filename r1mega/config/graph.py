"""Which stages of a recipe wait for which."""

from r1mega.config import tree
from r1mega.config.base import PathMark
from r1mega.config.schema import Recipe


def waits_for(recipe: Recipe) -> dict[str, list[str]]:
    """The stages that each stage reads from, in the recipe's order; both sides by name."""
    read = {name: {value for _, mark, value in tree.marked(stage, PathMark) if mark.names_stage} for name, stage in recipe.stages.items()}
    return {name: [earlier for earlier in recipe.stages if earlier in found] for name, found in read.items()}
