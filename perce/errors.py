"""The one exception for what a user can put right: commands print it as a paragraph and exit with code 2."""


class UserError(ValueError):
    """A mistake in the input, the command line or the environment; the message says what, where and the remedy.

    Args:
        message: a paragraph; a line break in it is of what it quotes.
        lines: of their own, below it.
    """

    def __str__(self) -> str:
        return "\n".join(map(str, self.args))


def in_one_line(error: Exception) -> str:
    """What an error of a library says, for the end of a sentence of ours."""
    return " ".join(str(error).split()) or type(error).__name__


def first_line(error: Exception) -> str:
    """The first line of what it says, where the rest is advice for others."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
