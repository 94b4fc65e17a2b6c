"""The one exception that a user is meant to read."""


class UserError(Exception):
    """Input that r1mega cannot use: one line that names the thing and the fix.

    The command line prints the message and exits with code 2. Raise it before anything is spent or written;
    anything else that escapes is a bug and keeps its traceback.
    """
