"""The old name of `fishertune_d2.streets`, kept as an alias."""

import sys

from fishertune_d2.streets import *  # noqa: F403
from fishertune_d2.streets.__main__ import run

if __name__ == "__main__":
    print("fishertune_d2.data.streets is now called fishertune_d2.streets", file=sys.stderr)
    run()
