"""What the tests share: inputs, oracles, tiny models, runs of the commands."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
"""The repository's root, in which tests start processes."""
