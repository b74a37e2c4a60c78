"""What a user can put right, as opposed to what is a fault of the program."""


class UserError(Exception):
    """Shown as its one line, without a traceback: it says what is wrong and what to do."""
