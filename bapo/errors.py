"""The one exception a user is meant to read."""


class BapoError(Exception):
    """Something the user can put right; the message is a sentence that says how.

    The command line prints it without a trace and exits with 2, the page shows it in place.
    """
