"""``python -m fishertune_d2.data.streets``: writes the built-in street scenes."""

from .dataset import main

if __name__ == "__main__":  # the processes that render import this file, too
    main()
