"""The logs of a run: the first lines tell what runs, and long listings go into files."""

import argparse
import logging
import re
import shlex
import sys
from pathlib import Path

import torch
from detectron2.config import CfgNode
from detectron2.utils import comm
from detectron2.utils.collect_env import collect_env_info
from detectron2.utils.env import seed_all_rng
from detectron2.utils.logger import setup_logger

from fishertune_d2.version import commit

# The loggers of a run, with the short names that the console shows.
_LOGGERS = {"fvcore": "fvcore", "detectron2": "d2", "fishertune_d2": "fishertune"}
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


class _Colourless(logging.Formatter):
    """Formats lines as Detectron2 does for files, without codes of colours in the messages."""

    def __init__(self) -> None:
        super().__init__("[%(asctime)s] %(name)s %(levelname)s: %(message)s", "%m/%d %H:%M:%S")

    def format(self, record: logging.LogRecord) -> str:
        return _COLOURS.sub("", super().format(record))


def set_up(cfg: CfgNode, args: argparse.Namespace) -> None:
    """Does the work of Detectron2's ``default_setup``, with a log that starts with the run.

    ``default_setup`` logs the config twice, in colours that also reach log.txt. Here the config is
    only in OUTPUT_DIR/config.yaml.

    Args:
        cfg: the config of the run.
        args: the command line of Detectron2's ``default_argument_parser``.
    """
    folder = Path(cfg.OUTPUT_DIR)
    if comm.is_main_process():
        folder.mkdir(parents=True, exist_ok=True)
    for name, short in _LOGGERS.items():
        start_logger(folder, name, short)
    if comm.is_main_process():
        (folder / "config.yaml").write_text(cfg.dump())
    logger = logging.getLogger("fishertune_d2")
    version = commit()
    logger.info(
        "%s%s, %d process(es) on %s%s",
        shlex.join([args.config_file, *map(str, args.opts)]),
        ", --resume" if args.resume else ", --eval-only" if args.eval_only else "",
        comm.get_world_size(),
        cfg.MODEL.DEVICE,
        f", commit {version} of FisherTune" if version else "",
    )
    logger.info("The full config is in %s", folder / "config.yaml")
    logger.info("Environment info:\n%s", collect_env_info())
    seed_all_rng(None if cfg.SEED < 0 else cfg.SEED + comm.get_rank())
    if not args.eval_only:  # test images have many sizes, and each would start a search
        torch.backends.cudnn.benchmark = cfg.CUDNN_BENCHMARK


def start_logger(folder: Path, name: str, short: str) -> None:
    """Starts Detectron2's logger of one name: coloured on a terminal, and plain in log.txt.

    Args:
        folder: OUTPUT_DIR.
        name: the root of the modules whose messages are logged.
        short: the name that the console shows.
    """
    on_terminal = sys.stdout.isatty()
    logger = setup_logger(
        str(folder), comm.get_rank(), color=on_terminal, name=name, abbrev_name=short
    )
    for handler in logger.handlers:
        if isinstance(handler, logging.StreamHandler) and handler.stream is not sys.stdout:
            handler.setFormatter(_Colourless())
