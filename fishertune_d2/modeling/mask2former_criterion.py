"""Matching and losses of Mask2Former, for which the host waits for a GPU once.

transformers matches each image with each prediction by itself, and waits for the GPU each time: 40
times in a step with four images. Here the costs of all of them are downloaded together.

Shapes:
    B: images in the batch; Q: queries; C: classes; P: predictions; N: points that are compared
    n: classes that an image holds; m: matched pairs of an image, min(Q, n)
    H, W: the padded images, in pixels; h, w: the map at stride 4
"""

from collections.abc import Sequence

import torch
from detectron2.utils import comm
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn import functional as F
from transformers import Mask2FormerConfig
from transformers.models.mask2former.modeling_mask2former import Mask2FormerLoss

# Class logits (B, Q, C + 1), the last one "no object", and mask logits (B, Q, h, w).
Prediction = tuple[Tensor, Tensor]
# For each image the queries (m,) and the masks (m,) that belong together, int64.
Matches = list[tuple[Tensor, Tensor]]


class Mask2FormerCriterion(Mask2FormerLoss):
    """transformers' losses on matches that are found for all predictions at once.

    transformers asks accelerate for the number of processes, which knows nothing of a group that
    Detectron2's launcher made: each process would divide by its own count of masks. Here the count
    is averaged over Detectron2's processes.

    Attributes:
        across_processes: False to count this process's masks only, as the loss of a single image
            must, or it would depend on what other processes hold.
    """

    across_processes = True

    def __init__(self, config: Mask2FormerConfig, weight_dict: dict[str, float]):
        """Makes the classes' weights a constant of the config, which no checkpoint holds.

        Args:
            config: as transformers' criterion takes it.
            weight_dict: weights of the losses, by transformers' names.
        """
        super().__init__(config, weight_dict)
        self.register_buffer("empty_weight", self.empty_weight, persistent=False)

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args) -> None:
        """Leaves out the constant that older checkpoints hold."""
        state_dict.pop(f"{prefix}empty_weight", None)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(
        self,
        predictions: dict[str, Prediction],
        masks: Sequence[Tensor],
        labels: Sequence[Tensor],
    ) -> dict[str, dict[str, Tensor]]:
        """Computes the losses of each prediction.

        Args:
            predictions: by name, in float32.
            masks: for each image (n, H, W) float32 of 0 and 1.
            labels: for each image the masks' classes, (n,) int64.

        Returns:
            By the prediction's name the losses by transformers' names, not weighted.

        Raises:
            FloatingPointError: if a prediction is not finite; names the predictions.
        """
        matched = self.match(predictions, masks, labels)
        count = self.get_num_masks(labels, masks[0].device)
        return {
            name: {
                **self.loss_masks(mask_logits, masks, matches, count),
                **self.loss_labels(class_logits, labels, matches),
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
        """Finds the cheapest pairs of queries and masks, for each prediction and image.

        Args:
            predictions: as in :meth:`forward`.
            masks: as in :meth:`forward`.
            labels: as in :meth:`forward`.

        Returns:
            The matches of each prediction, where the predictions are.

        Raises:
            FloatingPointError: if a prediction is not finite; names the predictions.
        """
        costs = self.costs(predictions.values(), masks, labels)
        # A sum is finite if all of its terms are, and reads them once.
        sums = torch.stack([logits.sum() for pair in predictions.values() for logits in pair])
        downloaded = torch.cat([sums, *(cost.flatten() for cost in costs)]).cpu()  # the one wait
        _require_finite(list(predictions), downloaded[: len(sums)])
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
        """What it costs to match each query with each mask, at N random points of each image.

        The costs are those of the published matcher: the probability that is missing for the mask's
        class, binary cross entropy (mean over points) and Dice loss, each with its weight.

        Args:
            predictions: P class logits and mask logits.
            masks: as in :meth:`forward`.
            labels: as in :meth:`forward`.

        Returns:
            For each image (P, Q, n).
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
            # The masks are the same for all predictions, so all points are in one row.
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

    def get_num_masks(self, class_labels: Sequence[Tensor], device: torch.device) -> Tensor:
        """Counts the target masks.

        Args:
            class_labels: for each image of this process, the classes of its masks.
            device: where the count is wanted.

        Returns:
            Scalar: masks per process, averaged over processes, and at least 1.
        """
        # full fills on the device; tensor() would upload.
        count = torch.full((), float(sum(len(labels) for labels in class_labels)), device=device)
        if self.across_processes and comm.get_world_size() > 1:
            torch.distributed.all_reduce(count)
            count /= comm.get_world_size()
        return count.clamp(min=1)


def _sample(maps: Tensor, points: Tensor) -> Tensor:
    """Maps (B, K, h, w) at points (B, N, 2) in -1 .. 1, bilinearly; 0 outside; (B, K, N)."""
    return F.grid_sample(maps, points[:, None], align_corners=False)[:, :, 0]


def _upload(pairs: list[list[tuple]], device: torch.device) -> list[Matches]:
    """Brings the indices of all matches to a device by one copy."""
    both = [torch.stack([torch.as_tensor(each) for each in pair]) for of in pairs for pair in of]
    uploaded = torch.cat(both, dim=1).to(device, non_blocking=True)
    parts = iter(uploaded.split([each.shape[1] for each in both], dim=1))
    return [[tuple(next(parts)) for _ in of] for of in pairs]


def _require_finite(names: Sequence[str], sums: Tensor) -> None:
    """Refuses predictions of which a logit is NaN or infinite.

    transformers' matcher replaces what is not finite by a large cost and goes on: the run would
    diverge in silence.

    Args:
        names: of the predictions.
        sums: of each prediction's class logits and mask logits, on the CPU.
    """
    if sums.isfinite().all():
        return
    kinds = [f"{kind}{name}" for name in names for kind in ("class logits", "mask logits")]
    bad = [kind for kind, good in zip(kinds, sums.isfinite().tolist(), strict=True) if not good]
    raise FloatingPointError(
        f"Mask2FormerHead predicts NaN or infinity in: {', '.join(bad)} (no number: the final "
        "prediction, _k: the one before decoder layer k). Lower SOLVER.BASE_LR, clip the gradients "
        "(SOLVER.CLIP_GRADIENTS), or check that the input images are finite."
    )
