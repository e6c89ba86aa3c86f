"""The loss of each image of a batch, as the Fisher information needs it.

Shapes: B images, C classes, (h, w) the map at stride 4.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fishertune_d2.fisher import image_seeds, sampled_nll, seeded
from fishertune_d2.modeling.mask2former import semantic_scores

_STRIDE = 4
_MIN_SCORE = 1e-6  # where every query says "no object", all classes are equally likely


class SegmentationLoss:
    """A ``loss_fn`` for :func:`fishertune_d2.fisher.estimate_fisher` on a ``VFMSegmentor``.

    The batch passes through the model once; then each image is matched and scored by itself, with
    random points of its own. Images of a batch should have one size: padding is seen by attention.
    """

    def __call__(self, model: nn.Module, batch: Sequence[dict]) -> Tensor:
        """Mask2Former's training loss with the labels in the batch: the weighted sum, (B,).

        Raises:
            FloatingPointError: if a prediction is not finite; names the image.
        """
        features, targets = model.features_and_targets(batch)
        head = model.sem_seg_head
        predictions = head.predict(features)
        losses = []
        for image, seed in enumerate(image_seeds(len(batch))):
            with seeded(seed):
                try:
                    losses.append(head.loss_of_image(predictions, targets, image))
                except FloatingPointError as error:
                    name = batch[image].get("file_name", f"image {image} of its batch")
                    raise FloatingPointError(f"estimation, on {name}: {error}") from error
        return torch.stack(losses)

    def sampled(self, model: nn.Module, batch: Sequence[dict]) -> Tensor:
        """Negative log-likelihood of labels drawn from the model, mean over pixels, (B,).

        Mask2Former has no normalised p(y | x). Its semantic scores, divided by their sum over
        classes, make one for each pixel, at stride 4.
        """
        features, _ = model.features_and_targets(batch)
        scores = semantic_scores(*model.sem_seg_head.predict(features)[-1]) + _MIN_SCORE
        log_probabilities = scores.log() - scores.sum(1, keepdim=True).log()
        losses = []
        for image, seed in enumerate(image_seeds(len(batch))):
            height, width = (-(-side // _STRIDE) for side in batch[image]["image"].shape[-2:])
            unpadded = log_probabilities[image : image + 1, :, :height, :width]
            losses.append(sampled_nll(unpadded, [seed]))
        return torch.cat(losses)
