"""The one exception that speaks to a user: what was wrong, where, and what to do next."""


class CrossFLError(Exception):
    """Bad input or a broken contract; its message is all the user needs to see."""
