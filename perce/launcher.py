"""The process that started this one: torchrun, when there are several."""

import os
import signal
import threading
import time

LAST_STEP_SECONDS = 120.0
"""What a process may take to end when its launcher is gone: a step and its checkpoint."""


def end_with_launcher() -> None:
    """Stop when torchrun is gone: killed, it leaves its processes behind, training in a directory that they hold."""
    if "TORCHELASTIC_RUN_ID" not in os.environ or os.name == "nt":
        return
    launcher = os.getppid()

    def watch() -> None:
        while os.getppid() == launcher:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(LAST_STEP_SECONDS)  # unless another process has ended, and this one waits for it
        os._exit(128 + signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()
