"""The command line: parse, call, print."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from r1mega.errors import UserError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0 done, 2 input that cannot be used, 1 anything else."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(prog="r1mega", description="DeepSeek-R1's training, whole, on Megatron-Core and SGLang.")
    parser.add_argument("command", choices=_COMMANDS, help="; ".join(f"{name}: {text}" for name, (text, _, _) in _COMMANDS.items()))
    name = parser.parse_args(given[:1]).command
    text, declare, call = _COMMANDS[name]
    command = argparse.ArgumentParser(prog=f"r1mega {name}", description=text)
    declare(command)
    try:
        # Intermixed, so that `key=value` may stand before, between and after options.
        return call(command.parse_intermixed_args(given[1:]))
    except UserError as error:
        print(f"r1mega: {error}", file=sys.stderr)
        return 2


def _declare_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", type=Path, metavar="RECIPE", help="YAML file")
    parser.add_argument("-o", "--output", type=Path, metavar="RUN_DIR", help="folder of the run (default: runs/<recipe name>)")
    parser.add_argument("--fresh", action="store_true", help="delete an earlier run in that folder first")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="change a key of the recipe, such as stages.zero.updates=100")


def _run(options: argparse.Namespace) -> int:
    from r1mega.pipeline import launcher

    return launcher.run(options.recipe, options.overrides, options.output, options.fresh)


_COMMANDS: dict[str, tuple[str, Callable[[argparse.ArgumentParser], None], Callable[[argparse.Namespace], int]]] = {
    "run": ("run a recipe, or go on with it where it stopped", _declare_run, _run),
}


if __name__ == "__main__":
    raise SystemExit(main())
