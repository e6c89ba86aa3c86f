"""The loaders of a config, and the file and class names for a run's record."""

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from torch.utils.data import DataLoader

from fishertune_d2.data import (
    SegmentationMapper,
    build_test_loader,
    build_train_loader,
    class_counts,
    dataset_metadata,
    load_datasets,
)
from fishertune_d2.data.samplers import RareClass, require_sampler

from .self_training import unlabelled_images


def training_loader(cfg: CfgNode) -> DataLoader:
    """The images of DATASETS.TRAIN in the order that SEED and DATALOADER.SAMPLER_TRAIN give."""
    sampler = cfg.DATALOADER.SAMPLER_TRAIN
    require_sampler(sampler)
    return build_train_loader(
        load_datasets(cfg.DATASETS.TRAIN),
        SegmentationMapper(cfg, is_train=True),
        batch_size=cfg.SOLVER.IMS_PER_BATCH,
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        seed=cfg.SEED,
        pin_memory=_on_gpu(cfg),
        sampler=sampler,
        class_counts=None if sampler == "TrainingSampler" else class_counts(cfg.DATASETS.TRAIN),
        repeat_threshold=cfg.DATALOADER.REPEAT_THRESHOLD,
        rare_class=RareClass(
            cfg.DATALOADER.RARE_CLASS_TEMPERATURE, cfg.DATALOADER.RARE_CLASS_PIXELS
        ),
        unlabelled=unlabelled_images(cfg),
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
    """The labelled images in the order of the data set; None if the loader is not ours."""
    dicts = getattr(getattr(loader, "dataset", None), "dicts", None)
    return None if dicts is None else [item["file_name"] for item in dicts]


def unlabelled_names(cfg: CfgNode, loader: object) -> list[str]:
    """Lists the images of self-training.

    Returns:
        Their files, in order.

    Raises:
        ValueError: SELF_TRAINING.IMAGES is set, and the loader of the user's own trainer has none.
    """
    dicts = getattr(getattr(loader, "dataset", None), "unlabelled", ())
    if cfg.SELF_TRAINING.IMAGES and not dicts:
        raise ValueError(
            f"SELF_TRAINING.IMAGES is {cfg.SELF_TRAINING.IMAGES!r}, but the loader of "
            "build_train_loader has no images without labels: build it with "
            "fishertune_d2.engine.loaders.training_loader, or set the key to ''"
        )
    return [item["file_name"] for item in dicts]


def class_names(cfg: CfgNode) -> tuple[str, ...] | None:
    """The names of the classes that are trained on; None if no such data set is registered."""
    names = [name for name in cfg.DATASETS.TRAIN if name in DatasetCatalog]
    return dataset_metadata(names[0]).classes if names else None


def _on_gpu(cfg: CfgNode) -> bool:
    return torch.device(cfg.MODEL.DEVICE).type == "cuda"
