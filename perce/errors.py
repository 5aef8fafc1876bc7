"""The one exception for what a user can put right: commands print it as a paragraph and exit with code 2."""


class UserError(ValueError):
    """A mistake in the input, the command line or the environment; the message says what, where and the remedy."""
