"""Shows what a trained model sees in images and videos; in a checkout also demo.py.

python -m fishertune_d2.predict --config-file OUTPUT_DIR/config.yaml --input PATH --output PATH
"""

import argparse
import logging
import sys
from collections.abc import Sequence

from fishertune_d2.compat import require_detectron2

require_detectron2()

from detectron2.utils.logger import setup_logger  # noqa: E402
from tqdm import tqdm  # noqa: E402

from fishertune_d2.data import DatasetError  # noqa: E402

from .files import draw_file, find_inputs, name_outputs  # noqa: E402
from .predictor import Predictor, read_run  # noqa: E402


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
    inputs = find_inputs(args.input)
    outputs = name_outputs(inputs, args.output)
    predictor = Predictor(read_run(args.config_file, args.opts))
    for source, target in tqdm(
        list(zip(inputs, outputs, strict=True)), unit="file", disable=len(inputs) == 1
    ):
        draw_file(predictor, source, target, confidence=args.confidence)
        logging.getLogger("fishertune_d2").info("%s -> %s", source, target)


def run() -> None:
    """Runs the command, and says in a sentence what was wrong with it.

    Raises:
        SystemExit: with that sentence.
    """
    setup_logger(name="fishertune_d2", abbrev_name="fishertune")
    try:
        main()
    except (DatasetError, OSError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    run()
