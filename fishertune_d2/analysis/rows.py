"""The old name of ``fishertune_d2.analysis.methods``, kept as an alias."""

import sys

from fishertune_d2.analysis.methods import main

if __name__ == "__main__":
    print(
        "fishertune_d2.analysis.rows is now called fishertune_d2.analysis.methods", file=sys.stderr
    )
    main()
