"""Functions that a recipe names by import path."""

import importlib
import inspect
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from r1mega.errors import UserError


def load_function(path: str, search_path: Sequence[Path] = (), arguments: int = 2, called: str | None = None) -> Callable[..., Any]:
    """The function at `module:function`.

    The folders of `search_path` join the end of `sys.path`, so a user's file never hides an installed module.
    Raises UserError for a malformed path, a module that does not import, a missing function, or one that does not take
    `arguments` positional arguments, which messages show as `called`.
    """
    module_name, colon, function_name = path.partition(":")
    if not (colon and module_name and function_name.isidentifier()):
        raise UserError(f"'{path}' is not an import path; write module:function, such as r1mega.rewards.math:accuracy")
    sys.path += [str(folder) for folder in search_path if str(folder) not in sys.path]
    importlib.invalidate_caches()
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise UserError(f"'{path}': importing {module_name} failed: {_line(error)}") from error
        where = ", ".join(str(folder) for folder in search_path)
        raise UserError(f"'{path}': no module {error.name!r} is installed{f' or lies in {where}' if where else ''}") from None
    except (Exception, SystemExit) as error:  # a user's module may fail in any way
        raise UserError(f"'{path}': importing {module_name} failed: {_line(error)}") from error
    function: Callable[..., Any] | None = getattr(module, function_name, None)
    if function is None or not callable(function):
        functions = [name for name, value in vars(module).items() if inspect.isfunction(value) and not name.startswith("_")]
        raise UserError(f"'{path}': {module_name} has no function {function_name!r}; it has {', '.join(functions) or 'none'}")
    _check_signature(path, function, arguments, called or ("(prompt, response)" if arguments == 2 else "(response)"))
    return function


def _check_signature(path: str, function: Callable[..., Any], arguments: int, called: str) -> None:
    try:
        signature = inspect.signature(function)
    except ValueError:  # some functions written in C do not tell
        return
    try:
        signature.bind(*range(arguments))
    except TypeError:
        raise UserError(f"'{path}' is called with {called} but is defined as {function.__name__}{signature}") from None


def _line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
