"""A stage that prints the messages of benchmarks/gpu/child.py without torch, and fails as its options say."""

import json
import os
import sys
import time


def say(**event: object) -> None:
    print(json.dumps(event), flush=True)


def main() -> None:
    request = json.loads(sys.stdin.read())
    if "does not start" in request["options"]:
        sys.exit("no torch here")
    say(
        machine={
            "device": "NVIDIA H100",
            "driver": "1",
            "packages": {"torch": "2"},
            "commit": "abc",
            "date": "2026-01-01",
        }
    )
    for what, key in request["options"]["script"]:
        if key in request["finished"] or key in request["lost"]:
            continue
        say(begin=key)
        if what == "crashes":
            print("CUDA error: an illegal memory access", file=sys.stderr)
            os._exit(7)
        if what == "hangs":
            time.sleep(60)
        if what == "sleeps":
            time.sleep(0.3)
        say(line=key, value=len(request["lost"]), partial=what == "partial")
    say(done=True)


if __name__ == "__main__":
    main()
