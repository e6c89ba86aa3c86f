"""Trains and evaluates a segmentation model: ``python -m fishertune_d2.train``.

    python -m fishertune_d2.train --config-file FILE [--num-gpus N] [--resume] [KEY VALUE ...]
    python -m fishertune_d2.train --config-file FILE --overwrite [KEY VALUE ...]
    python -m fishertune_d2.train --config-file FILE --eval-only MODEL.WEIGHTS model_final.pth
    torchrun --nproc-per-node N -m fishertune_d2.train --config-file FILE [MODEL.DEVICE cpu]

FILE is a path, or the name of a config that comes with the package, such as fishertune_dinov2.yaml.
In a checkout train_net.py is the same command.
"""

import argparse
import logging
import os
import sys
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.engine import default_argument_parser
from detectron2.evaluation import verify_results
from detectron2.utils import comm
from torch.multiprocessing import ProcessExitedException

from fishertune_d2.analysis.selection_map import draw_run
from fishertune_d2.command_line import add_import_option, ending_in_a_sentence, import_files
from fishertune_d2.config import find_config, read_config
from fishertune_d2.config_slips import dotted_items
from fishertune_d2.data import check_datasets
from fishertune_d2.engine import Trainer, launch, log_plan
from fishertune_d2.engine.output_dir import (
    files_of_run,
    remove_run,
    require_own_weights,
    require_resumable,
    require_unused,
    require_writable,
)
from fishertune_d2.engine.run_logs import set_up
from fishertune_d2.engine.run_record import run_of
from fishertune_d2.engine.scoring import metrics_by_name
from fishertune_d2.engine.start_check import (
    require_device,
    require_file,
    require_possible,
    require_scorable,
)
from fishertune_d2.engine.trained_model import build_trained, find_weights
from fishertune_d2.renamed_configs import current_config
from fishertune_d2.unread_keys import warn_of_unread_keys


def setup(args: argparse.Namespace) -> CfgNode:
    """Reads the config, and sets up this process's logging."""
    cfg = read_config(args.config_file, args.opts)
    record = Path(cfg.OUTPUT_DIR, "config.yaml")
    of_a_run = (args.resume or args.eval_only) and record.is_file()
    before = record.read_text() if of_a_run else ""
    set_up(cfg, args)
    if of_a_run and comm.is_main_process():
        # The earlier run's: this one only evaluates, or is not yet allowed to resume.
        record.write_text(before)
    return cfg


def main(args: argparse.Namespace) -> dict | None:
    """Runs one process; ends in one sentence if the user can fix the cause of an error."""
    with ending_in_a_sentence():
        import_files(args.imports)  # a spawned process has imported nothing yet
        cfg = setup(args)
        return _score(cfg, args) if args.eval_only else _train(cfg, args)


def _score(cfg: CfgNode, args: argparse.Namespace) -> dict:
    """Scores a checkpoint on the test sets."""
    warn_of_unread_keys(cfg)
    require_own_weights(cfg.OUTPUT_DIR, args.weights)
    check_datasets(cfg.DATASETS.TEST, cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES)
    model = build_trained(cfg, args.weights, build=Trainer.build_model)
    folder, trained_by = Path(cfg.OUTPUT_DIR), run_of(model)
    if comm.is_main_process() and trained_by and not (folder / "metrics.json").exists():
        # A folder of scores alone keeps the config of the training, not this command's.
        (folder / "config.yaml").write_text(trained_by.applied_to(cfg).dump())
    results = Trainer.test(cfg, model)
    if comm.is_main_process():
        verify_results(cfg, metrics_by_name(results))
    return results


def _train(cfg: CfgNode, args: argparse.Namespace) -> dict | None:
    """Trains a model, and scores it."""
    # Here, so that the plan and config.yaml also say what this number of processes trains.
    cfg = Trainer.auto_scale_workers(cfg, comm.get_world_size())
    log_plan(cfg)
    _check_data(cfg)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    if comm.is_main_process():
        Path(cfg.OUTPUT_DIR, "config.yaml").write_text(cfg.dump())
    results = trainer.train()
    if comm.is_main_process():
        picture = draw_run(cfg.OUTPUT_DIR)
        if picture is not None:
            logging.getLogger("fishertune_d2").info("Map of the selected weights: %s", picture)
    return results


def _check_data(cfg: CfgNode) -> None:
    names = [*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST]
    check_datasets(names, cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES)


def run() -> None:
    """Runs the command, in as many processes as it asks for.

    It exits after one sentence if the user can fix the cause of an error, or with the code of a
    process that failed or that a signal ended.

    Raises:
        ProcessExitedException: if a process was killed.
    """
    parser = default_argument_parser()
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="delete the files of an earlier run in OUTPUT_DIR, and start anew",
    )
    add_import_option(parser)
    args = parser.parse_args()
    if not args.config_file:
        parser.error("--config-file is needed, for example --config-file configs/demo.yaml")
    with ending_in_a_sentence():
        import_files(args.imports)
        name, former = current_config(args.config_file)
        args.config_file, args.opts = find_config(name), [*former, *args.opts]
        cfg = read_config(args.config_file, args.opts)
        _check_start(cfg, args)
        try:
            launch(main, args, device=cfg.MODEL.DEVICE)
        except ProcessExitedException as error:
            if error.exit_code <= 0:  # killed, for example for its memory
                raise
            sys.exit(error.exit_code)  # that process has printed its reason


def _check_start(cfg: CfgNode, args: argparse.Namespace) -> None:
    """Refuses a run that the config or the machine rules out, before any process starts."""
    require_device(cfg.MODEL.DEVICE)
    require_writable(cfg.OUTPUT_DIR)
    if args.eval_only:
        require_scorable(cfg)
        args.weights = find_weights(cfg, args.resume)  # --resume reads the checkpoint to its end
        if not cfg.DATASETS.TEST:
            raise ValueError("DATASETS.TEST names no data set, so there is nothing to score")
        return
    if args.resume and args.overwrite:
        raise ValueError("--resume goes on with a run and --overwrite deletes it: choose one")
    processes = int(os.environ.get("WORLD_SIZE", max(1, args.num_gpus * args.num_machines)))
    scaled = Trainer.auto_scale_workers(cfg, processes)
    require_possible(scaled, processes)
    # Only the first process of the first machine goes on, because the others start at any time.
    if int(os.environ.get("RANK", args.machine_rank)) > 0:
        return
    if args.resume:
        require_resumable(scaled)
        return
    if args.overwrite and files_of_run(cfg.OUTPUT_DIR):
        _require_startable(cfg)
        remove_run(cfg.OUTPUT_DIR)
    require_unused(cfg.OUTPUT_DIR)


def _require_startable(cfg: CfgNode) -> None:
    """Refuses to delete a run for a new one that could not start."""
    going = {path.resolve() for path in files_of_run(cfg.OUTPUT_DIR)}
    values = dict(dotted_items(cfg))
    for key in "TUNING.WARMUP_CHECKPOINT FISHER.ESTIMATE MODEL.WEIGHTS MODEL.VFM.WEIGHTS".split():
        file = values[key]
        if Path(file).resolve() in going:
            raise ValueError(
                f"--overwrite would delete {file}, from which {key} starts the new run: choose "
                "another OUTPUT_DIR"
            )
        if not key.startswith("MODEL.VFM"):  # which may be a word, or found in the network
            require_file(key, file)
    logging.disable(logging.WARNING)  # the run itself logs them
    try:
        _check_data(cfg)
    finally:
        logging.disable(logging.NOTSET)


if __name__ == "__main__":
    run()
