"""The loaders of a config, and what a run's record keeps of its training data."""

import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from torch.utils.data import DataLoader

from fishertune_d2.data import (
    SegmentationMapper,
    build_test_loader,
    build_train_loader,
    load_datasets,
)


def training_loader(cfg: CfgNode) -> DataLoader:
    """The images of DATASETS.TRAIN in the order that SEED and DATALOADER.SAMPLER_TRAIN give."""
    return build_train_loader(
        load_datasets(cfg.DATASETS.TRAIN),
        SegmentationMapper(cfg, is_train=True),
        batch_size=cfg.SOLVER.IMS_PER_BATCH,
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        seed=cfg.SEED,
        pin_memory=_on_gpu(cfg),
    )


def scoring_loader(cfg: CfgNode, name: str) -> DataLoader:
    """The images of one test set, one after the other."""
    return build_test_loader(
        load_datasets([name]),
        SegmentationMapper(cfg, is_train=False),
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        pin_memory=_on_gpu(cfg),
    )


def file_names(loader: object) -> list[str] | None:
    """The training images in the order of the data set; None of a loader that is not ours."""
    dicts = getattr(getattr(loader, "dataset", None), "dicts", None)
    return None if dicts is None else [item["file_name"] for item in dicts]


def class_names(cfg: CfgNode) -> list[str] | None:
    """The names of the classes that are trained on; None if the catalog does not know them."""
    names = cfg.DATASETS.TRAIN
    return MetadataCatalog.get(names[0]).get("stuff_classes") if names else None


def _on_gpu(cfg: CfgNode) -> bool:
    return torch.device(cfg.MODEL.DEVICE).type == "cuda"
