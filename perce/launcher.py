"""Ends this process if torchrun, which started it, is gone."""

import os
import signal
import threading
import time

LAST_STEP_SECONDS = 240.0
"""Time for a process to end once its launcher is gone: enough for the step, the next one, and a checkpoint."""


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
