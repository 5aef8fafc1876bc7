"""Whether the Hub can be reached."""

import functools

from perce.errors import first_line


@functools.cache
def hub_failure() -> str | None:
    """Why the Hub cannot be reached, tried once, for ten seconds; None if it can. The Hub's own library tries half a
    minute per file."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=10)
    except Exception as error:  # of whichever network library it uses
        return first_line(error)
    return None
