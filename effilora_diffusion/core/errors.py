"""The one error type a user's mistake may raise."""


class EffiLoRAError(ValueError):
    """Something the user can mend: the message names what, where and what to do. Commands exit with code 2 on it."""
