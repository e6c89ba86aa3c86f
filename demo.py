#!/usr/bin/env python
"""Shows what a trained model sees in images and videos.

python demo.py --config-file OUTPUT_DIR/config.yaml --input street.jpg --output seen.png
python demo.py --config-file FILE --input FOLDER "night/*.png" drive.mp4 --output seen --confidence
python demo.py ... --opts MODEL.WEIGHTS model_0004999.pth MODEL.DEVICE cpu
"""

import argparse
import logging
import sys
from collections.abc import Sequence

from detectron2.utils.logger import setup_logger
from tqdm import tqdm

from fishertune_d2.data import DatasetError
from fishertune_d2.predict import Predictor, draw_file, find_inputs, name_outputs, read_run


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


if __name__ == "__main__":
    setup_logger(name="fishertune_d2", abbrev_name="fishertune")
    try:
        main()
    except (DatasetError, OSError, ValueError) as error:  # it says what to do, as no traceback does
        sys.exit(f"error: {error}")
