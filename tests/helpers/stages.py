"""Runs a stage of the GPU commands in this process, on a CPU."""

from benchmarks.gpu.child import Child, Request


def lines_of(stage, name: str, *, seconds: float = 120.0, finished=(), lost=(), **options) -> dict[str, dict]:
    """The lines of a stage that runs in this process, by the part of their keys after the stage's name."""
    found: dict[str, dict] = {}

    def say(event):
        if "line" in event:
            found[event.pop("line").removeprefix(f"{name}/")] = event

    stage(Child(Request(name, seconds, "cpu", finished=list(finished), lost=dict(lost), options=options), say))
    return found
