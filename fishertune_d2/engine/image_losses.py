"""The loss of each image of a batch, which the Fisher information needs.

Shapes: B images, C classes, (h, w) the map at the head's stride.
"""

from collections.abc import Sequence
from math import ceil
from typing import Any, cast

import torch
from torch import Tensor, nn

from fishertune_d2.fisher import image_seeds, sampled_nll, seeded
from fishertune_d2.modeling.heads import in_eval_mode
from fishertune_d2.modeling.segmentor import VFMSegmentor


class SegmentationLoss:
    """A ``loss_fn`` for :func:`fishertune_d2.fisher.estimate_fisher` on a ``VFMSegmentor``.

    The batch passes through the model once; then each image is scored by itself, with random points
    of its own where the head draws points. Images of a batch should have one size, because
    attention sees padding.
    """

    def __call__(self, model: nn.Module, batch: Sequence[dict]) -> Tensor:
        """The head's training loss of each image with the batch's labels: weighted sums, (B,)."""
        model = cast(VFMSegmentor, model)
        features, targets = model.features_and_targets(list(batch))
        predictions = _predict(model, features)
        losses = []
        for image, seed in enumerate(image_seeds(len(batch))):
            with seeded(seed):
                try:
                    losses.append(model.head.loss_of_image(predictions, targets, image))
                except FloatingPointError as error:  # a prediction that is not finite
                    name = batch[image].get("file_name", f"image {image} of its batch")
                    raise FloatingPointError(f"estimation, on {name}: {error}") from error
        return torch.stack(losses)

    def sampled(self, model: nn.Module, batch: Sequence[dict]) -> Tensor:
        """The negative log-likelihood of labels drawn from the model: mean over pixels, (B,)."""
        # Without MODEL.SEM_SEG_HEAD.LOSS_WEIGHT, which is a weight of the training loss.
        model = cast(VFMSegmentor, model)
        features, _ = model.features_and_targets(list(batch))
        head = model.head
        log_probabilities = head.log_probabilities(_predict(model, features))
        losses = []
        for image, seed in enumerate(image_seeds(len(batch))):
            height, width = (ceil(side / head.stride) for side in batch[image]["image"].shape[-2:])
            unpadded = log_probabilities[image : image + 1, :, :height, :width]
            losses.append(sampled_nll(unpadded, [seed]))
        return torch.cat(losses)


def _predict(model: VFMSegmentor, features: dict[str, Tensor]) -> Any:
    """The head's predictions without dropout, which depends on an image's place in its batch."""
    # Some heads call dropout as a function, which `estimate_fisher` cannot switch off.
    with in_eval_mode(model.sem_seg_head):
        return model.head.predict(features)
