"""Shows what a trained model sees in images and videos; in a checkout also demo.py.

python -m fishertune_d2.predict --config-file OUTPUT_DIR/config.yaml --input PATH --output PATH
"""

import argparse
from collections.abc import Sequence

from detectron2.utils.logger import setup_logger

from fishertune_d2.command_line import ending_in_a_sentence

from .files import draw_files, find_inputs, name_outputs
from .predictor import Predictor, read_run


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command.

    Args:
        arguments: of the command line; None takes the process's own.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--config-file",
        required=True,
        metavar="FILE",
        help="of a run: its config.yaml; the weights are model_final.pth beside it",
    )
    parser.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="PATH",
        help="images, videos, folders of them, or patterns in quotes",
    )
    parser.add_argument(
        "--output",
        required=True,
        metavar="PATH",
        help="a file (.png, .jpg, ...; .mp4 of a video) for one input, else a folder",
    )
    parser.add_argument(
        "--confidence", action="store_true", help="beside it, draw how sure the model is"
    )
    parser.add_argument(
        "--opts",
        nargs=argparse.REMAINDER,
        default=[],
        metavar="KEY VALUE",
        help="last: keys of the config and their values, as MODEL.WEIGHTS FILE",
    )
    args = parser.parse_args(arguments)
    with ending_in_a_sentence():
        inputs = find_inputs(args.input)
        outputs = name_outputs(inputs, args.output)
        predictor = Predictor(read_run(args.config_file, args.opts))
        draw_files(predictor, inputs, outputs, confidence=args.confidence)


def run() -> None:
    """Runs the command, and logs what it does."""
    setup_logger(name="fishertune_d2", abbrev_name="fishertune")
    main()


if __name__ == "__main__":
    run()
