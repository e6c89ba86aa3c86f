"""Matching and losses of Mask2Former, for which the host waits for a GPU only once.

transformers matches each image with each prediction separately, and waits for the GPU each time: 40
times in a step with four images. This criterion downloads the costs of all of them together.

Shapes:
    B: images in the batch; Q: queries; C: classes; P: predictions; N: points that are compared
    n: classes in an image; m: matched pairs of an image, min(Q, n)
    H, W: the padded images, in pixels; h, w: the map at stride 4
"""

from collections.abc import Sequence
from itertools import islice

import torch
from detectron2.utils import comm
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn import functional as F
from transformers import Mask2FormerConfig
from transformers.models.mask2former.modeling_mask2former import Mask2FormerLoss

# Class logits (B, Q, C + 1), the last one "no object", and mask logits (B, Q, h, w).
Prediction = tuple[Tensor, Tensor]
# For each image the matched queries (m,) and masks (m,), int64.
Matches = list[tuple[Tensor, Tensor]]


class Mask2FormerCriterion(Mask2FormerLoss):
    """transformers' losses, with the matches of all predictions found at once.

    transformers asks accelerate for the number of processes. accelerate does not know the group of
    Detectron2's launcher, so each process would divide by its own count of masks. This criterion
    averages the count over Detectron2's processes.

    Attributes:
        across_processes: False counts only the masks of this process. The loss of a single image
            needs this, or it would depend on the images of other processes.
    """

    across_processes = True

    def __init__(self, config: Mask2FormerConfig, weight_dict: dict[str, float]):
        """Keeps the classes' weights, constants of the config, out of checkpoints."""
        super().__init__(config, weight_dict)
        self.register_buffer("empty_weight", self.empty_weight, persistent=False)

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args) -> None:
        """Ignores the constant that older checkpoints hold."""
        state_dict.pop(f"{prefix}empty_weight", None)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(  # type: ignore[override]  # it takes all predictions, transformers' the last
        self,
        predictions: dict[str, Prediction],
        masks: list[Tensor],
        labels: list[Tensor],
    ) -> dict[str, dict[str, Tensor]]:
        """Computes the losses of each prediction.

        Args:
            predictions: by name, in float32.
            masks: for each image (n, H, W) float32 of 0 and 1.
            labels: for each image the masks' classes, (n,) int64.

        Returns:
            The losses without weights, by the name of the prediction and transformers' name of the
            loss. A prediction that is not finite raises a FloatingPointError, see `match`.
        """
        matched = self.match(predictions, masks, labels)
        count = self.get_num_masks(labels, masks[0].device)
        # transformers annotates the matches as numpy arrays and the count as an int.
        return {
            name: {
                **self.loss_masks(mask_logits, masks, matches, count),  # type: ignore[arg-type]
                **self.loss_labels(class_logits, labels, matches),  # type: ignore[arg-type]
            }
            for (name, (class_logits, mask_logits)), matches in zip(
                predictions.items(), matched, strict=True
            )
        }

    @torch.no_grad()
    def match(
        self,
        predictions: dict[str, Prediction],
        masks: Sequence[Tensor],
        labels: Sequence[Tensor],
    ) -> list[Matches]:
        """Returns the cheapest pairs of queries and masks of each prediction, on its device.

        The arguments are those of `forward`. A prediction that is not finite raises a
        FloatingPointError that names it.
        """
        costs = self.costs(list(predictions.values()), masks, labels)
        # A sum of finite terms is finite, and reads each term once.
        sums = torch.stack([logits.sum() for pair in predictions.values() for logits in pair])
        downloaded = torch.cat([sums, *(cost.flatten() for cost in costs)]).cpu()  # the one wait
        require_finite(list(predictions), downloaded[: len(sums)])
        parts = downloaded[len(sums) :].split([cost.numel() for cost in costs])
        by_image = [part.view(cost.shape) for part, cost in zip(parts, costs, strict=True)]
        pairs = [
            [linear_sum_assignment(cost[k].numpy()) for cost in by_image]
            for k in range(len(predictions))
        ]
        return _upload(pairs, sums.device)

    def costs(
        self,
        predictions: Sequence[Prediction],
        masks: Sequence[Tensor],
        labels: Sequence[Tensor],
    ) -> list[Tensor]:
        """Returns for each image the cost (P, Q, n) of each pair of query and mask.

        The costs are those of the published matcher, at N random points: minus the probability of
        the mask's class, binary cross entropy (mean over points) and Dice loss, each weighted.
        """
        matcher = self.matcher
        probabilities = torch.stack([c for c, _ in predictions]).softmax(-1)  # (P, B, Q, C + 1)
        shape = (len(predictions), len(masks), matcher.num_points, 2)
        points = 2 * torch.rand(shape, device=probabilities.device) - 1  # (x, y) for grid_sample
        sampled = torch.stack(  # (P, B, Q, N)
            [_sample(m, points[k]) for k, (_, m) in enumerate(predictions)]
        )
        costs = []
        for image, (mask, label) in enumerate(zip(masks, labels, strict=True)):
            x = sampled[:, image]
            # All predictions share the masks, so one call samples all their points:
            # (1, n, P * N) -> (P, N, n)
            wanted = _sample(mask[None], points[:, image].reshape(1, -1, 2))
            wanted = wanted.view(len(mask), len(x), matcher.num_points).permute(1, 2, 0)
            p = x.sigmoid()
            # -log p = softplus(x) - x and -log (1 - p) = softplus(x)
            cross_entropy = (F.softplus(x).sum(-1, keepdim=True) - x @ wanted) / x.shape[-1]
            size = p.sum(-1, keepdim=True) + wanted.sum(-2, keepdim=True)
            dice = 1 - (2 * (p @ wanted) + 1) / (size + 1)
            missing = -probabilities[:, image].index_select(-1, label)
            costs.append(
                matcher.cost_mask * cross_entropy
                + matcher.cost_dice * dice
                + matcher.cost_class * missing
            )
        return costs

    def get_num_masks(  # type: ignore[override]  # transformers passes a list, not a Tensor
        self, class_labels: Sequence[Tensor], device: torch.device
    ) -> Tensor:
        """Counts the target masks per process, averaged over processes, and at least 1; scalar."""
        # full fills on the device; tensor() would upload.
        count = torch.full((), float(sum(len(labels) for labels in class_labels)), device=device)
        if self.across_processes and comm.get_world_size() > 1:
            torch.distributed.all_reduce(count)
            count /= comm.get_world_size()
        return count.clamp(min=1)


def _sample(maps: Tensor, points: Tensor) -> Tensor:
    """Samples maps (B, K, h, w) bilinearly at points (B, N, 2) in -1 .. 1, 0 outside: (B, K, N)."""
    return F.grid_sample(maps, points[:, None], align_corners=False)[:, :, 0]


def _upload(pairs: list[list[tuple]], device: torch.device) -> list[Matches]:
    """Copies the indices of all matches to a device at once."""
    both = [
        torch.stack([torch.as_tensor(indices) for indices in pair])
        for of_prediction in pairs
        for pair in of_prediction
    ]
    uploaded = torch.cat(both, dim=1).to(device, non_blocking=True)
    parts = iter(uploaded.split([pair.shape[1] for pair in both], dim=1))
    return [[(pair[0], pair[1]) for pair in islice(parts, len(images))] for images in pairs]


def require_finite(names: Sequence[str], sums: Tensor) -> None:
    """Refuses NaN and infinity; ``sums`` are those of each prediction's class and mask logits."""
    # transformers' matcher replaces such values by a large cost, so the run would diverge silently.
    if sums.isfinite().all():
        return
    kinds = [f"{kind}{name}" for name in names for kind in ("class logits", "mask logits")]
    bad = [kind for kind, good in zip(kinds, sums.isfinite().tolist(), strict=True) if not good]
    raise FloatingPointError(
        f"Mask2FormerHead predicts NaN or infinity in: {', '.join(bad)} (no number: the final "
        "prediction, _k: the one before decoder layer k). Lower SOLVER.BASE_LR, clip the gradients "
        "(SOLVER.CLIP_GRADIENTS), or check that the input images are finite."
    )
