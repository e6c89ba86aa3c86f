"""FisherTune on Detectron2's ViTDet with Mask R-CNN, from a LazyConfig.

    python examples/vitdet_mask_rcnn.py

Needs no data, no download, no GPU and no compiled part of Detectron2; it takes half a minute. The
config is that of Detectron2's configs/common/models/mask_rcnn_vitdet.py, made small.
"""

import json
import tempfile
from pathlib import Path

import numpy as np
import torch
from detectron2 import data, modeling
from detectron2.config import LazyCall as L
from detectron2.config import instantiate
from detectron2.data.datasets import register_coco_instances
from detectron2.engine import SimpleTrainer
from detectron2.layers import ShapeSpec
from detectron2.modeling import anchor_generator, poolers, proposal_generator, roi_heads
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.matcher import Matcher
from detectron2.solver.build import get_default_optimizer_params
from detectron2.utils.logger import setup_logger
from PIL import Image, ImageDraw
from torch import Tensor, nn
from what_moved import table

from fishertune_d2 import apply_fishertune
from fishertune_d2.fisher import Selection

SIDE, CHANNELS = 128, 32  # of an image in pixels, and of a map of the pyramid
MAPS = ["p2", "p3", "p4", "p5"]
POOLER = {"scales": [1 / 4, 1 / 8, 1 / 16, 1 / 32], "sampling_ratio": 0}

# fmt: off
model = L(modeling.GeneralizedRCNN)(
    backbone=L(modeling.SimpleFeaturePyramid)(
        net=L(modeling.ViT)(  # its weights are what FisherTune selects from
            img_size=SIDE, embed_dim=48, depth=6, num_heads=2, use_rel_pos=True,
            window_size=3, window_block_indexes=[0, 1, 3, 4],
        ),
        in_feature="last_feat", out_channels=CHANNELS, scale_factors=(4.0, 2.0, 1.0, 0.5),
        top_block=L(LastLevelMaxPool)(), square_pad=SIDE,
    ),
    proposal_generator=L(proposal_generator.RPN)(
        in_features=[*MAPS, "p6"],
        head=L(proposal_generator.StandardRPNHead)(in_channels=CHANNELS, num_anchors=1),
        anchor_generator=L(anchor_generator.DefaultAnchorGenerator)(
            sizes=[[8], [16], [32], [64], [128]], aspect_ratios=[1.0], strides=[4, 8, 16, 32, 64],
        ),
        anchor_matcher=L(Matcher)(
            thresholds=[0.3, 0.7], labels=[0, -1, 1], allow_low_quality_matches=True
        ),
        box2box_transform=L(Box2BoxTransform)(weights=[1.0, 1.0, 1.0, 1.0]),
        batch_size_per_image=32, positive_fraction=0.5,
        pre_nms_topk=(200, 100), post_nms_topk=(50, 50),
    ),
    roi_heads=L(modeling.StandardROIHeads)(
        num_classes=2, batch_size_per_image=16, positive_fraction=0.25,
        proposal_matcher=L(Matcher)(thresholds=[0.5], labels=[0, 1]),
        box_in_features=MAPS,
        box_pooler=L(poolers.ROIPooler)(output_size=7, pooler_type="ROIAlignV2", **POOLER),
        box_head=L(roi_heads.FastRCNNConvFCHead)(
            input_shape=ShapeSpec(channels=CHANNELS, height=7, width=7), conv_dims=[], fc_dims=[64],
        ),
        box_predictor=L(roi_heads.FastRCNNOutputLayers)(
            input_shape=ShapeSpec(channels=64), num_classes=2,
            box2box_transform=L(Box2BoxTransform)(weights=[10.0, 10.0, 5.0, 5.0]),
        ),
        mask_in_features=MAPS,
        mask_pooler=L(poolers.ROIPooler)(output_size=14, pooler_type="ROIAlignV2", **POOLER),
        mask_head=L(roi_heads.MaskRCNNConvUpsampleHead)(
            input_shape=ShapeSpec(channels=CHANNELS), num_classes=2, conv_dims=[CHANNELS] * 2,
        ),
    ),
    pixel_mean=[123.675, 116.28, 103.53], pixel_std=[58.395, 57.12, 57.375], input_format="RGB",
)
optimizer = L(torch.optim.AdamW)(
    params=L(get_default_optimizer_params)(weight_decay_norm=0.0), lr=1e-3, weight_decay=0.1,
)
loader = L(data.build_detection_train_loader)(
    dataset=L(data.get_detection_dataset_dicts)(names="shapes"),
    mapper=L(data.DatasetMapper)(
        is_train=True, augmentations=[], image_format="RGB", use_instance_mask=True,
    ),
    total_batch_size=2,
)
# fmt: on


def draw_data(root: Path) -> None:
    """Eight pictures of a square and a triangle, and COCO's json for them."""
    random = np.random.default_rng(0)
    images, annotations = [], []
    for i in range(8):
        picture = Image.fromarray(random.integers(0, 90, (SIDE, SIDE, 3), dtype=np.uint8))
        for kind, corners in (1, [0, 0, 47, 0, 47, 47, 0, 47]), (2, [0, 0, 47, 0, 47, 47]):
            x, y = random.integers(0, SIDE - 48, 2).tolist()
            polygon = [n + (x, y)[k % 2] for k, n in enumerate(corners)]
            ImageDraw.Draw(picture).polygon(polygon, fill=(200, 160, 80 * kind))
            shape = {"bbox": [x, y, 47, 47], "segmentation": [polygon], "area": 47**2, "iscrowd": 0}
            annotations.append({"id": 2 * i + kind, "image_id": i, "category_id": kind, **shape})
        picture.save(root / f"{i}.png")
        images.append({"id": i, "file_name": f"{i}.png", "height": SIDE, "width": SIDE})
    categories = [{"id": 1, "name": "square"}, {"id": 2, "name": "triangle"}]
    coco = {"images": images, "annotations": annotations, "categories": categories}
    (root / "coco.json").write_text(json.dumps(coco))


def main(max_iter: int = 40) -> tuple[dict[str, Tensor], nn.Module, Selection, list[float]]:
    """Trains and prints what moved; returns the weights before, model, selection and losses."""
    setup_logger(name="fishertune_d2")  # shows what is selected
    torch.manual_seed(0)
    detector = instantiate(model)
    before = {name: tensor.clone() for name, tensor in detector.state_dict().items()}
    optimizer.params.model = detector
    with tempfile.TemporaryDirectory() as folder:
        draw_data(Path(folder))
        register_coco_instances("shapes", {}, f"{folder}/coco.json", folder)
        trainer = SimpleTrainer(detector, instantiate(loader), instantiate(optimizer))
        estimation = apply_fishertune(
            trainer,
            instantiate(loader),
            max_iter=max_iter,
            output_dir=folder,
            warmup=max_iter // 4,
            batches=4,
        )
        trainer.train(0, max_iter)
    losses = [loss for loss, _ in trainer.storage.history("total_loss").values()]
    print(table(before, detector, estimation.selection, "backbone.net"))
    print(f"loss: {losses[0]:.2f} at first, {losses[-1]:.2f} in the end")
    return before, detector, estimation.selection, losses


if __name__ == "__main__":
    main()
