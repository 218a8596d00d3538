"""The one exception that is the user's to mend."""


class UserError(Exception):
    """Something the user can fix. Printed as one line that names the fix; exit code 2, no traceback."""
