"""FisherTune on a timm classifier, in a plain PyTorch loop without Detectron2.

    python examples/timm_classifier.py

It takes some seconds and needs no data, no download and no GPU. The loop has the three stages of
Algorithm 1: train the head alone, select by Fisher information, train head and selected weights.
"""

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from what_moved import table

from fishertune_d2 import fisher
from fishertune_d2.tuning import SelectedWeights

Batch = list[tuple[Tensor, int]]


def draw_batch(generator: torch.Generator) -> Batch:
    """Draws eight noisy images, each with a tint of red, green or blue, and the tints as labels."""
    labels = torch.randint(3, (8,), generator=generator).tolist()
    images = torch.randn(8, 3, 64, 64, generator=generator)
    for image, label in zip(images, labels, strict=True):
        image[label] += 0.2
    return list(zip(images, labels, strict=True))


def logits_of(model: nn.Module, batch: Batch) -> Tensor:
    """The model's logits, (B, 3)."""
    return model(torch.stack([image for image, _ in batch]))


def labels_of(batch: Batch) -> Tensor:
    """The labels of a batch, (B,)."""
    return torch.tensor([label for _, label in batch])


def train_step(model: nn.Module, batch: Batch, optimizer: torch.optim.Optimizer) -> float:
    """Trains for one step and returns the loss."""
    loss = F.cross_entropy(logits_of(model, batch), labels_of(batch))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    """An optimizer of the trainable parameters, with momentum and a strong weight decay."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.1)


def main(max_iter: int = 60) -> tuple[dict[str, Tensor], nn.Module, fisher.Selection, list[float]]:
    """Trains and prints the moved weights; returns weights before, model, selection and losses."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    model = timm.create_model("test_vit", img_size=64, num_classes=3)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    model.requires_grad_(False)
    model.head.requires_grad_(True)
    warmup, optimizer = max_iter // 4, adamw(model)
    losses = [train_step(model, draw_batch(generator), optimizer) for _ in range(warmup)]

    batches = [draw_batch(generator) for _ in range(4)]
    likelihood = fisher.SoftmaxLikelihood(logits_of)
    backbone = sum(p.numel() for name, p in before.items() if not name.startswith("head."))
    selection = fisher.select(model, batches, likelihood, 0.05, base=backbone, labels="sampled")
    print(selection)

    selected = SelectedWeights(model, selection)  # its values are parameters of the model now
    optimizer = adamw(model)
    for step in range(max_iter - warmup):
        progress = step / (max_iter - warmup - 1)
        selected.grow(fisher.tuned_share(progress, d_min=0.01, d_max=0.05))  # Eq. 16
        losses.append(train_step(model, draw_batch(generator), optimizer))
    selected.release()  # restores the plain model, with the tuned weights in it

    print(table(before, model, selection, backbone=""))
    print(f"loss: {losses[0]:.2f} at first, {losses[-1]:.2f} in the end")
    return before, model, selection, losses


if __name__ == "__main__":
    main()
