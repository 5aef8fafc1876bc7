"""The process of a command: libraries silenced when it begins, whether it is the first of several, and how it ends: its
exit code, a closed stdout, and its end if torchrun, which started it, is gone."""

import io
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable
from contextlib import suppress

from perce.errors import UserError, what_to_install
from perce.visible import say

LAST_STEP_SECONDS = 240.0
"""Time for a process to end once its launcher is gone: enough for the step, the next one, and a checkpoint."""


def guarded(run: Callable[[], object]) -> int:
    """Run a command and return its exit code: 0; 2 after one paragraph on stderr about a mistake that the user can
    correct; 130 after Ctrl-C; 141 when the reader of stdout has closed it (`| head`)."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the shell, `>&-`
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):  # its encoding may lack characters, such as an arrow
        sys.stdout.reconfigure(errors="replace")
    code = 0
    try:
        try:
            run()
        except UserError as error:
            message, *lines = error.args
            say(f"error: {message}", *lines, error=True)
            code = 2
        except ImportError as error:
            if (advice := what_to_install(error)) is None:
                raise
            say(f"error: {advice}", error=True)
            code = 2
        finally:
            sys.stdout.flush()
    except KeyboardInterrupt:
        say("Interrupted.", error=True)
        return 128 + signal.SIGINT
    except OSError:
        if (failure := _failure_of_stdout()) is None:
            raise
        if isinstance(failure, BrokenPipeError):
            return code or 128 + signal.SIGPIPE
        with suppress(OSError):
            say(f"error: stdout: cannot be written to ({failure.strerror}).", error=True)
        return 2
    return code


def _failure_of_stdout() -> OSError | None:
    """The error if stdout can no longer be written to, else None. What is still buffered then is discarded."""
    try:
        print(flush=True)
    except OSError as error:
        with suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return error
    return None


def silence_libraries() -> None:
    """Keep logs, progress bars and a warning of libraries out of what a command prints."""
    import datasets
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    # PEFT still asks transformers 5.23 for an attribute under its old name.
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)


def is_first_process() -> bool:
    """Whether this process is the first of those that were launched together, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def check_alone(command: str) -> None:
    """UserError if torchrun started several processes of a command other than training: each would do all of the work,
    and where they write records, the second ends them all."""
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if "TORCHELASTIC_RUN_ID" in os.environ and processes > 1:
        raise UserError(f"{command}: {processes} processes were started, and it runs in one. Leave out torchrun.")


def end_with_launcher() -> None:
    """Stop when torchrun is gone: a killed torchrun leaves its processes training, in a directory that they lock."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    launcher = os.getppid()

    def watch() -> None:
        while os.getppid() == launcher:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(LAST_STEP_SECONDS)  # a process that waits for one which has ended would never stop by itself
        os._exit(128 + signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()
