"""Run in the engine's own environment: an SGLang server whose API key stands in no log and no list of processes."""

import os
import sys


class _Hidden(str):
    """The key as SGLang may print it among its settings. Child processes get a plain string."""

    def __repr__(self) -> str:
        return "'<key>'"

    def __deepcopy__(self, memo: object) -> "_Hidden":
        return self

    def __reduce__(self) -> tuple[type, tuple[str]]:
        return str, (str(self),)


def main() -> None:
    """Serve with the arguments of `sglang.launch_server`; the key comes in the variable that the first argument names."""
    from sglang.launch_server import run_server
    from sglang.srt.plugins import load_plugins
    from sglang.srt.server_args import prepare_server_args

    variable, *arguments = sys.argv[1:]
    load_plugins()
    settings = prepare_server_args(arguments)
    settings.api_key = _Hidden(os.environ.pop(variable))
    run_server(settings)


if __name__ == "__main__":
    main()
