"""The commit that a benchmark measures, and the versions of packages."""

import importlib.metadata
import os
import subprocess
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).parents[1]
COMMIT = "PERCE_COMMIT"  # environment variable: names the commit of files that were copied


def commit(root: Path = ROOT) -> str | None:
    """The first 12 digits, and "-dirty" if tracked files were changed (those in benchmarks/results do not count).

    $PERCE_COMMIT takes precedence, because the repository of a copied tree may be outdated. None if there is neither.
    """
    if os.environ.get(COMMIT) or not (root / ".git").exists():
        return os.environ.get(COMMIT) or None

    def git(*command: str) -> str:
        return subprocess.run(["git", "-C", root, *command], capture_output=True, text=True, check=True).stdout.strip()

    try:
        head = git("rev-parse", "--short=12", "HEAD")
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results")
    except (OSError, subprocess.SubprocessError):  # no git, no commit yet, or another user's files
        return None
    return f"{head}-dirty" if changed else head


def versions(packages: Iterable[str]) -> dict[str, str | None]:
    """The installed version of each package; None if it is not installed."""

    def version(package: str) -> str | None:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return None

    return {package: version(package) for package in packages}
