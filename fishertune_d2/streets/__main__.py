"""``python -m fishertune_d2.streets`` writes the built-in street scenes."""

from fishertune_d2.command_line import ending_in_a_sentence

from .dataset import main


def run() -> None:
    """Runs the command."""
    with ending_in_a_sentence():
        main()


if __name__ == "__main__":  # the processes that render import this file, too
    run()
