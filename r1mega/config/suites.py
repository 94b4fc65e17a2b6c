"""Benchmarks by name: the YAML files that ship with the package, or a user's own."""

from importlib import resources
from pathlib import Path

from r1mega.config.evaluation import Suite
from r1mega.config.loading import load_suite
from r1mega.errors import UserError


def names() -> list[str]:
    """The benchmarks that ship with the package."""
    return sorted(entry.name.removesuffix(".yaml") for entry in _folder().iterdir() if entry.name.endswith(".yaml"))


def find(name: str) -> Suite:
    """A shipped benchmark by its name, or a user's by the path of its YAML file; UserError when it is neither."""
    if name in names():
        with resources.as_file(_folder() / f"{name}.yaml") as path:
            return load_suite(path)
    if Path(name).suffix not in (".yaml", ".yml"):
        raise UserError(f"no suite {name!r}; there are {', '.join(names())}, or name a YAML file")
    return load_suite(Path(name))


def _folder() -> resources.abc.Traversable:
    return resources.files("r1mega") / "suites"
