"""What a command does before anything expensive: output files are claimed, and libraries' chatter is turned down."""

import warnings
from pathlib import Path

from perce.errors import UserError


def prepare(*outputs: str | None) -> None:
    """UserError for an output file that could not be written; directories on the way are made."""
    import datasets
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    # PEFT still asks transformers 5.23 for an attribute under its old name.
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
    for path in filter(None, outputs):
        try:
            Path(path).expanduser().parent.mkdir(parents=True, exist_ok=True)
            with Path(path).expanduser().open("a"):
                pass
        except OSError as error:
            raise UserError(f"{path}: cannot be written to ({error.strerror}). Choose another file.") from error
