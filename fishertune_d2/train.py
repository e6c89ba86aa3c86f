"""Trains and evaluates a segmentation model: ``python -m fishertune_d2.train``.

    python -m fishertune_d2.train --config-file FILE [--num-gpus N] [--resume] [KEY VALUE ...]
    python -m fishertune_d2.train --config-file FILE --eval-only MODEL.WEIGHTS model_final.pth
    torchrun --nproc-per-node N -m fishertune_d2.train --config-file FILE [MODEL.DEVICE cpu]

FILE is a path, or the name of a config that comes with the package, as fishertune_dinov2.yaml. In a
checkout train_net.py is the same command.
"""

import argparse
import logging
import sys
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.engine import default_argument_parser, default_setup
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from torch.multiprocessing import ProcessExitedException

from fishertune_d2.analysis.selection_map import draw_run
from fishertune_d2.config import find_config, read_config
from fishertune_d2.data import DatasetError, check_datasets
from fishertune_d2.engine import Trainer, WholeCheckpointer, launch, log_plan, preemption
from fishertune_d2.tuning import build_tuning_method


def setup(args: argparse.Namespace) -> CfgNode:
    """Reads the config, and sets up this process's logging."""
    cfg = read_config(args.config_file, args.opts)
    record = Path(cfg.OUTPUT_DIR, "config.yaml")
    of_a_run = (args.resume or args.eval_only) and record.is_file()
    before = record.read_text() if of_a_run else ""
    default_setup(cfg, args)
    if of_a_run and comm.is_main_process():
        # Of the run that is there: this one only evaluates, or is not yet accepted to go on.
        record.write_text(before)
    setup_logger(cfg.OUTPUT_DIR, comm.get_rank(), name="fishertune_d2", abbrev_name="fishertune")
    return cfg


def main(args: argparse.Namespace) -> dict | None:
    """Runs one process."""
    cfg = setup(args)
    log_plan(cfg)
    num_classes = cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES
    if args.eval_only:
        check_datasets(cfg.DATASETS.TEST, num_classes)
        model = Trainer.build_model(cfg)
        checkpointer = WholeCheckpointer(model, cfg.OUTPUT_DIR, method=build_tuning_method(cfg))
        checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=args.resume)
        return Trainer.test(cfg, model)
    check_datasets([*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST], num_classes)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    if comm.is_main_process():
        Path(cfg.OUTPUT_DIR, "config.yaml").write_text(cfg.dump())
    results = trainer.train()
    if comm.is_main_process():
        picture = draw_run(cfg.OUTPUT_DIR)
        if picture is not None:
            logging.getLogger("fishertune_d2").info("Map of what was selected: %s", picture)
    return results


def run() -> None:
    """Runs the command, in as many processes as it asks for.

    Raises:
        SystemExit: if data are missing, or a signal ended the run.
    """
    parser = default_argument_parser()
    args = parser.parse_args()
    try:
        args.config_file = find_config(args.config_file)
    except FileNotFoundError as error:
        parser.error(str(error))
    try:
        launch(main, args, device=read_config(args.config_file, args.opts).MODEL.DEVICE)
    except DatasetError as error:  # it says what to do; a traceback would hide that
        sys.exit(f"error: {error}")
    except ProcessExitedException as error:
        if error.exit_code != preemption.EXIT_CODE:
            raise
        sys.exit(preemption.EXIT_CODE)


if __name__ == "__main__":
    run()
