"""The version of FisherTune, for the records of runs."""

import subprocess
from pathlib import Path

_CHECKOUT = Path(__file__).resolve().parents[1]


def commit() -> str | None:
    """The checkout's commit, marked if files differ from it; None outside a checkout."""
    # Outside a checkout, git would answer for any repository around the environment.
    if not (_CHECKOUT / ".git").exists():
        return None
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        found = subprocess.run(command, cwd=_CHECKOUT, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):  # no git, or a slow disk
        return None
    return found.stdout.strip() or None
