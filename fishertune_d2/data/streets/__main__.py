"""``python -m fishertune_d2.data.streets``: writes the built-in street scenes."""

from fishertune_d2.command_line import ending_in_a_sentence

from .dataset import main

if __name__ == "__main__":  # the processes that render import this file, too
    with ending_in_a_sentence():
        main()
