"""Run in the engine's own environment: an SGLang server whose API key stands in no log and no list of processes."""

import os
import signal
import sys
import traceback


class _Hidden(str):
    """The key as SGLang may print it among its settings. Child processes get a plain string."""

    def __repr__(self) -> str:
        return "'<key>'"

    def __deepcopy__(self, memo: object) -> "_Hidden":
        return self

    def __reduce__(self) -> tuple[type, tuple[str]]:
        return str, (str(self),)


def bind_group() -> None:
    """Have a second process end the whole process group when this one ends.

    SGLang's processes ask to die with their parent only after a minute of imports; a parent that dies before leaves them for ever.
    """
    reading, writing = os.pipe()
    if os.fork() == 0:
        os.close(writing)
        os.read(reading, 1)  # returns when the other end is closed, which is when its only holder is gone
        os.killpg(0, signal.SIGKILL)
    os.close(reading)


def main() -> None:
    """Serve with the arguments of `sglang.launch_server`; the key comes in the variable that the first argument names.

    Parts of a server after its first are given none, they serve nobody.
    """
    bind_group()
    from sglang.launch_server import run_server
    from sglang.srt.plugins import load_plugins
    from sglang.srt.server_args import prepare_server_args

    variable, *arguments = sys.argv[1:]
    load_plugins()
    settings = prepare_server_args(arguments)
    key = os.environ.pop(variable, None)
    settings.api_key = _Hidden(key) if key else None
    try:
        run_server(settings)
    except BaseException:  # noqa: BLE001 - whatever ended it has to be in the log, and then all of it has to end
        traceback.print_exc()
    # Where no HTTP could be served, an orderly exit would wait for ever for processes that serve on.
    sys.stderr.flush()
    os._exit(1)


if __name__ == "__main__":
    main()
