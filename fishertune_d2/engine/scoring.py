"""Scores a model on every test set and writes one table."""

import json
import logging
from collections import OrderedDict
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from detectron2.config import CfgNode
from detectron2.evaluation import inference_on_dataset
from detectron2.utils import comm
from torch import nn

from fishertune_d2.data import SegmentationMapper, build_test_loader, load_datasets
from fishertune_d2.evaluation import DomainGeneralizationEvaluator, format_table, summarize
from fishertune_d2.version import commit

from .plan import plan
from .step import autocast_dtype, set_matmul_precision

logger = logging.getLogger(__name__)


def score_datasets(cfg: CfgNode, model: nn.Module) -> OrderedDict:
    """Scores ``model`` on DATASETS.TEST.

    Writes ``results.json`` (mIoU of the source and of each unseen domain, their average, IoU by
    class, counts of parameters, the protocol) and the pictures into OUTPUT_DIR.

    Args:
        cfg: DATASETS, DATALOADER, SOLVER.AMP, TEST, TUNING and OUTPUT_DIR are read.
        model: the segmentor, without DDP wrapper.

    Returns:
        By data set what its evaluator returned, and ``"unseen": {"mIoU": average}``, so that
        TEST.EXPECTED_RESULTS can name either; empty on all ranks but the first.
    """
    set_matmul_precision(cfg)
    results: OrderedDict = OrderedDict()
    mapper = SegmentationMapper(cfg, is_train=False)
    device = next(model.parameters()).device
    for name in cfg.DATASETS.TEST:
        loader = build_test_loader(
            load_datasets([name]),
            mapper,
            num_workers=cfg.DATALOADER.NUM_WORKERS,
            pin_memory=device.type == "cuda",
        )
        evaluator = DomainGeneralizationEvaluator(cfg, name, output_dir=cfg.OUTPUT_DIR)
        with scoring_autocast(cfg, device):
            results[name] = inference_on_dataset(model, loader, evaluator)
    if not comm.is_main_process() or not results:
        return OrderedDict()
    summary = summarize(results, cfg.DATASETS.TRAIN, _protocol(cfg), mapper)
    summary |= plan(cfg)  # not of the model, which may hold vectors of selected weights beside them
    path = Path(cfg.OUTPUT_DIR) / "results.json"
    path.write_text(json.dumps(summary, indent=2) + "\n")
    logger.info("Results in percent, also in %s:\n%s", path, format_table(summary))
    if cfg.TEST.PICTURES:
        logger.info("Pictures of image, label and prediction: %s", path.parent / "pictures")
    if summary["target_average"] is not None:
        results["unseen"] = {"mIoU": summary["target_average"]}
    return results


def scoring_autocast(cfg: CfgNode, device: torch.device) -> AbstractContextManager:
    """The autocast that a model is scored, and predicts, under: that of its training.

    Args:
        cfg: SOLVER.AMP is read.
        device: where the model lies.
    """
    dtype = autocast_dtype(cfg)
    return torch.autocast(device.type, dtype, enabled=dtype is not None)


def _protocol(cfg: CfgNode) -> dict:
    protocol = {"mode": cfg.TEST.MODE, "class_rule": cfg.TEST.CLASS_RULE}
    # Without this entry: float32, which older results were scored in.
    if cfg.SOLVER.AMP.ENABLED:
        protocol["precision"] = cfg.SOLVER.AMP.PRECISION
    elif cfg.SOLVER.MATMUL_PRECISION != "highest":
        protocol["precision"] = f"float32, {cfg.SOLVER.MATMUL_PRECISION} matrix products"
    if cfg.TEST.MODE == "slide":
        protocol |= {"crop": list(cfg.TEST.CROP_SIZE), "stride": list(cfg.TEST.STRIDE)}
    return {
        **protocol,
        "vfm": cfg.MODEL.VFM.NAME,
        "train": list(cfg.DATASETS.TRAIN),
        "method": cfg.TUNING.METHOD,
        "feature_perturbation": cfg.TUNING.FEATURE_PERTURBATION,
        "seed": cfg.SEED,
        "iterations": cfg.SOLVER.MAX_ITER,
        "warmup_iterations": cfg.TUNING.WARMUP_ITERS,
        "batch_size": cfg.SOLVER.IMS_PER_BATCH,
        "commit": commit(),
    }
