"""FisherTune on Detectron2's SimpleTrainer, with your own model and optimizer.

    python examples/simple_trainer.py

It takes some seconds and needs no data, no download and no GPU. SGD with momentum and weight decay
holds all weights, but moves only the selected weights of the backbone.
"""

import tempfile
from collections.abc import Iterator

import timm
import torch
from detectron2.engine import SimpleTrainer
from detectron2.utils.logger import setup_logger
from torch import Tensor, nn
from torch.nn import functional as F
from what_moved import table

from fishertune_d2 import apply_fishertune
from fishertune_d2.fisher import Selection


class Classifier(nn.Module):
    """The interface of Detectron2's trainers: from a batch of dicts to losses by name."""

    def __init__(self):
        super().__init__()
        self.backbone = timm.create_model("test_vit", img_size=64, num_classes=0)
        self.head = nn.Linear(self.backbone.num_features, 3)

    def forward(self, batch: list[dict]) -> dict[str, Tensor]:
        """Cross entropy, mean over the batch."""
        images = torch.stack([item["image"] for item in batch])
        labels = torch.tensor([item["label"] for item in batch])
        return {"loss_class": F.cross_entropy(self.head(self.backbone(images)), labels)}


def draw_batches(seed: int) -> Iterator[list[dict]]:
    """Yields endless batches of 8 noisy images, each with a tint of red, green or blue."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        labels = torch.randint(3, (8,), generator=generator).tolist()
        images = torch.randn(8, 3, 64, 64, generator=generator)
        for image, label in zip(images, labels, strict=True):
            image[label] += 0.2
        yield [{"image": i, "label": n} for i, n in zip(images, labels, strict=True)]


def main(max_iter: int = 60) -> tuple[dict[str, Tensor], nn.Module, Selection, list[float]]:
    """Trains and prints the moved weights; returns weights before, model, selection and losses."""
    setup_logger(name="fishertune_d2")  # logs the selected weights
    torch.manual_seed(0)
    model = Classifier()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=0.05)
    trainer = SimpleTrainer(model, draw_batches(seed=0), optimizer)
    with tempfile.TemporaryDirectory() as output_dir:
        estimation = apply_fishertune(
            trainer,
            draw_batches(seed=1),
            max_iter=max_iter,
            output_dir=output_dir,
            warmup=max_iter // 4,
            batches=4,
        )
        trainer.train(0, max_iter)
    losses = [loss for loss, _ in trainer.storage.history("total_loss").values()]
    print(table(before, model, estimation.selection, "backbone"))
    print(f"loss: {losses[0]:.2f} at first, {losses[-1]:.2f} in the end")
    return before, model, estimation.selection, losses


if __name__ == "__main__":
    main()
