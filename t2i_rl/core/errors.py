"""The one exception that is the user's to mend, and what any error says first."""


class UserError(Exception):
    """Something the user can fix.

    Printed as one line that names the fix; exit code 2, no traceback.
    """


def first_line(error: BaseException) -> str:
    """What an error says first; its kind where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
