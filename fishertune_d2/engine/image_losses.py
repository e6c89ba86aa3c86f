"""The loss of each image of a batch, as the Fisher information needs it.

Shapes: B images, C classes, (h, w) the map at the head's stride.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fishertune_d2.fisher import image_seeds, sampled_nll, seeded
from fishertune_d2.modeling.heads import in_eval_mode


class SegmentationLoss:
    """A ``loss_fn`` for :func:`fishertune_d2.fisher.estimate_fisher` on a ``VFMSegmentor``.

    The batch passes through the model once; then each image is scored by itself, with random points
    of its own where the head draws points. Images of a batch should have one size: padding is seen
    by attention.
    """

    def __call__(self, model: nn.Module, batch: Sequence[dict]) -> Tensor:
        """The head's training loss with the labels in the batch: the weighted sum, (B,).

        Raises:
            FloatingPointError: if a prediction is not finite; names the image.
        """
        features, targets = model.features_and_targets(batch)
        predictions = _predict(model, features)
        losses = []
        for image, seed in enumerate(image_seeds(len(batch))):
            with seeded(seed):
                try:
                    losses.append(model.head.loss_of_image(predictions, targets, image))
                except FloatingPointError as error:
                    name = batch[image].get("file_name", f"image {image} of its batch")
                    raise FloatingPointError(f"estimation, on {name}: {error}") from error
        return torch.stack(losses)

    def sampled(self, model: nn.Module, batch: Sequence[dict]) -> Tensor:
        """Negative log-likelihood of labels drawn from the model, mean over pixels, (B,).

        It has no weight: MODEL.SEM_SEG_HEAD.LOSS_WEIGHT is one of the training loss.
        """
        features, _ = model.features_and_targets(batch)
        head = model.head
        log_probabilities = head.log_probabilities(_predict(model, features))
        losses = []
        for image, seed in enumerate(image_seeds(len(batch))):
            height, width = (-(-side // head.stride) for side in batch[image]["image"].shape[-2:])
            unpadded = log_probabilities[image : image + 1, :, :height, :width]
            losses.append(sampled_nll(unpadded, [seed]))
        return torch.cat(losses)


def _predict(model: nn.Module, features: dict[str, Tensor]) -> Any:
    """What the head predicts without dropout, which would depend on an image's place in its batch.

    Some heads call dropout as a function, which `estimate_fisher` cannot switch off.
    """
    with in_eval_mode(model.sem_seg_head):
        return model.head.predict(features)
