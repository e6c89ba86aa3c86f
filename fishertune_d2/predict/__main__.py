"""Draws the predictions of a trained model for images and videos; in a checkout also demo.py.

python -m fishertune_d2.predict --config-file OUTPUT_DIR/config.yaml --input PATH --output PATH
"""

import argparse
from collections.abc import Sequence

from detectron2.utils.logger import setup_logger

from fishertune_d2.command_line import add_import_option, ending_in_a_sentence, import_files

from .drawing import draw_files
from .inputs import find_inputs, name_outputs
from .predictor import Predictor, read_run


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--config-file",
        required=True,
        metavar="FILE",
        help="the config.yaml of a run; its weights are model_final.pth beside it",
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
        help="a file (.png, .jpg, ...; .mp4 for a video) for one input, else a folder",
    )
    parser.add_argument(
        "--confidence", action="store_true", help="also draw the confidence of each pixel"
    )
    add_import_option(parser)
    parser.add_argument(
        "--opts",
        nargs=argparse.REMAINDER,
        default=[],
        metavar="KEY VALUE",
        help="last: keys of the config and their values, such as MODEL.WEIGHTS FILE",
    )
    args = parser.parse_args(arguments)
    with ending_in_a_sentence():
        import_files(args.imports)
        inputs = find_inputs(args.input)
        outputs = name_outputs(inputs, args.output)
        predictor = Predictor(read_run(args.config_file, args.opts))
        draw_files(predictor, inputs, outputs, confidence=args.confidence)


def run() -> None:
    """Runs the command with log messages."""
    setup_logger(name="fishertune_d2", abbrev_name="fishertune")
    main()


if __name__ == "__main__":
    run()
