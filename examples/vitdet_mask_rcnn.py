"""FisherTune on Detectron2's ViTDet with Mask R-CNN, from a LazyConfig.

    python examples/vitdet_mask_rcnn.py

It takes half a minute and needs no data, no download, no GPU and no compiled part of Detectron2.
The configs are small versions of Detectron2's own: configs/common/models/mask_rcnn_vitdet.py, its
optimizer and its data loader.
"""

import json
import tempfile
from pathlib import Path

import numpy as np
import torch
from detectron2.config import instantiate
from detectron2.data.datasets import register_coco_instances
from detectron2.engine import SimpleTrainer
from detectron2.layers import ShapeSpec
from detectron2.model_zoo import get_config
from detectron2.utils.logger import setup_logger
from PIL import Image, ImageDraw
from torch import Tensor, nn
from what_moved import table

from fishertune_d2 import apply_fishertune
from fishertune_d2.fisher import Selection

SIDE, CHANNELS = 128, 32  # of an image in pixels, and of a map of the pyramid

model = get_config("common/models/mask_rcnn_vitdet.py").model
# FisherTune selects among the weights of its ViT. The lines up to the optimizer make it small.
model.backbone.net.update(img_size=SIDE, embed_dim=48, depth=6, num_heads=2)
model.backbone.net.update(window_size=3, window_block_indexes=[0, 1, 3, 4])
model.backbone.update(out_channels=CHANNELS, square_pad=SIDE)
rpn, heads = model.proposal_generator, model.roi_heads
rpn.head.in_channels = CHANNELS
rpn.anchor_generator.sizes = [[8], [16], [32], [64], [128]]
rpn.update(batch_size_per_image=32, pre_nms_topk=(200, 100), post_nms_topk=(50, 50))
heads.update(num_classes=2, batch_size_per_image=16)
heads.box_head.update(
    input_shape=ShapeSpec(channels=CHANNELS, height=7, width=7), conv_dims=[], fc_dims=[64]
)
heads.box_predictor.input_shape = ShapeSpec(channels=64)
heads.mask_head.update(input_shape=ShapeSpec(channels=CHANNELS), conv_dims=[CHANNELS] * 2)

optimizer = get_config("common/optim.py").AdamW
optimizer.lr = 1e-3
train = get_config("common/data/coco.py").dataloader.train
train.dataset.names = "shapes"
train.mapper.update(augmentations=[], image_format="RGB")
train.update(total_batch_size=2, num_workers=0)


def draw_data(root: Path) -> None:
    """Draws eight pictures of a square and a triangle, and writes COCO's JSON for them."""
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
    """Trains and prints the moved weights; returns weights before, model, selection and losses."""
    setup_logger(name="fishertune_d2")  # logs the selected weights
    torch.manual_seed(0)
    detector = instantiate(model)
    before = {name: tensor.clone() for name, tensor in detector.state_dict().items()}
    optimizer.params.model = detector
    with tempfile.TemporaryDirectory() as folder:
        draw_data(Path(folder))
        register_coco_instances("shapes", {}, f"{folder}/coco.json", folder)
        trainer = SimpleTrainer(detector, instantiate(train), instantiate(optimizer))
        estimation = apply_fishertune(
            trainer,
            instantiate(train),
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
