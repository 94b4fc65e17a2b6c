"""What a score depends on beside the model: with these equal, two scores can be compared."""

import ast
import hashlib
import importlib.util
import json
import sys
from collections.abc import Iterator, Sequence
from functools import cache
from importlib import metadata
from importlib.machinery import ModuleSpec
from pathlib import Path

from r1mega.config.base import at
from r1mega.config.evaluation import Suite
from r1mega.data.prompts import Prompt
from r1mega.data.templates import R1_ZERO

_DIGITS = 12
"""Of a SHA-256, in hexadecimal."""


def version(suite: Suite, prompts: Sequence[Prompt]) -> dict[str, str]:
    """Digests of the questions with their reference answers, the template, the sampling, every function, and libraries' versions.

    A function's digest is that of its module and of all modules of the same package, or beside it, that this one imports. The template
    `chat` is the model's own and has no digest here; neither k nor deadlines are part, since they do not change what is estimated.
    """
    settings = {name: getattr(suite.sampling, name) for name in ("temperature", "top_p", "max_new_tokens")}
    functions = {"judge": suite.judge, "extract": suite.extract, "equal": suite.equal}
    functions |= {f"measures.{name}": path for name, path in suite.measures.items()}
    functions |= {f"weights.{name}": path for name, path in suite.weights.items()}
    found = {
        "prompts": _digest(json.dumps([_plain(prompt) for prompt in prompts], sort_keys=True, default=str)),
        "template": f"r1_zero {_digest(R1_ZERO)}" if suite.prompts.template == "r1_zero" else suite.prompts.template,
        "sampling": ", ".join(f"{name} {at(value, 0):.12g}" for name, value in settings.items()),
        "truncated": suite.truncated,
    }
    libraries: set[str] = set()
    for name, path in functions.items():
        if path is not None:
            digest, needed = source_of(path)
            found[name] = f"{path} {digest}"
            libraries |= needed
    return found | {library: metadata.version(library) for library in sorted(libraries)}


def source_of(path: str) -> tuple[str, set[str]]:
    """Digest of the source behind an import path, and the distributions that it imports."""
    sources: dict[str, str] = {}
    foreign: set[str] = set()
    root = _spec(path.partition(":")[0])
    waiting = [root] if root is not None else []
    while waiting:
        spec = waiting.pop()
        if spec.name in sources or not spec.origin or not spec.origin.endswith(".py"):
            continue
        sources[spec.name] = Path(spec.origin).read_text(encoding="utf-8")
        for name in _imported(ast.parse(sources[spec.name]), spec):
            top = name.partition(".")[0]
            if top in sys.stdlib_module_names:
                continue
            found = _spec(name)
            assert root is not None and root.origin is not None, "it was waited for"
            if top == root.name.partition(".")[0] or (found and found.origin and Path(found.origin).parent == Path(root.origin).parent):
                waiting += [found] if found else []
            else:
                foreign.add(top)
    known = _distributions() if foreign else {}
    digest = _digest("\0".join(f"{name}\0{source}" for name, source in sorted(sources.items())))
    return digest, {distribution for name in foreign for distribution in known.get(name, ())}


def _imported(tree: ast.Module, spec: ModuleSpec) -> Iterator[str]:
    """Full names of what a module imports; of `from a import b` both, since b may be a module."""
    package = spec.name if spec.submodule_search_locations is not None else spec.name.rpartition(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level and not package:
                continue  # it will not import either
            name = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            yield name
            yield from (f"{name}.{alias.name}" for alias in node.names)


def _spec(name: str) -> ModuleSpec | None:
    try:
        return importlib.util.find_spec(name)
    except (ImportError, AttributeError, ValueError):  # `a.b` where a is no package, or a module without a spec
        return None


@cache
def _distributions() -> dict[str, list[str]]:
    return {name: sorted(set(found)) for name, found in metadata.packages_distributions().items()}


def _plain(prompt: Prompt) -> dict[str, object]:
    return {
        "text": prompt.text,
        "history": [vars(message) for message in prompt.history],
        "answer": prompt.answer,
        "meta": dict(prompt.meta),
    }


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:_DIGITS]
