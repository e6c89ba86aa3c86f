"""A backbone and a semantic segmentation head as a Detectron2 meta-architecture.

Shapes:
    B: images in the batch; C: classes
    H, W: an image as it enters the model; height, width: the same image as it lies on disk
"""

import logging
from collections.abc import Sequence
from math import isfinite

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import META_ARCH_REGISTRY, Backbone, build_backbone, build_sem_seg_head
from detectron2.structures import ImageList
from detectron2.utils import comm
from torch import nn
from torch.nn import functional as F

from fishertune_d2.modeling.build_head import why_not_built
from fishertune_d2.modeling.detectron2_heads import DETECTRON2_HEADS
from fishertune_d2.modeling.heads import (
    WORKING_HEADS,
    SegmentationHead,
    require_drivable,
    require_splittable,
    segmentation_head,
)
from fishertune_d2.modeling.sliding import sliding_average
from fishertune_d2.modeling.targets import SegmentationTargets, present_classes
from fishertune_d2.modeling.vfm_table import Pixels, pixel_statistics

logger = logging.getLogger(__name__)

TEST_MODES = ("whole", "slide")
# The parts that hold the weights. A load may bring what lies beside them, such as pixel_mean.
_PARTS = ("backbone.", "sem_seg_head.")


@META_ARCH_REGISTRY.register()
class VFMSegmentor(nn.Module):
    """Losses in training; class scores of whole images, or of sliding windows, in evaluation.

    Attributes:
        untrained: names of the state dict's tensors that are still as they were initialised. At
            first these are the tensors of the decoder, because a backbone comes with weights of
            its own. After weights have been loaded, they are all tensors that no load has filled,
            of the backbone too. It is empty once a training step has been computed.
        unplaced: names of tensors of the backbone or the head that a load has brought and the model
            has no place for, such as the prompts of a tuning method that is not attached. It is
            empty again once a load has filled the whole model and left nothing over, or a training
            step has been computed.
    """

    @configurable
    def __init__(
        self,
        *,
        backbone: Backbone,
        sem_seg_head: nn.Module,
        pixel_mean: list[float],
        pixel_std: list[float],
        test_mode: str,
        crop_size: tuple[int, int],
        stride: tuple[int, int],
        windows_per_batch: int = 1,
    ):
        """Puts the parts together.

        Args:
            backbone: images (B, 3, H, W) -> dict of feature maps.
            sem_seg_head: has what `SegmentationHead` lists, or is one of Detectron2's heads that
                predict a logit for each class and pixel, see `PixelHead`.
            pixel_mean: mean of each channel, on the images' scale.
            pixel_std: standard deviation of each channel, on the images' scale.
            test_mode: "whole" or "slide".
            crop_size: height and width of a sliding window, in pixels.
            stride: pixels between windows, vertically and horizontally.
            windows_per_batch: how many windows of an image pass through the model at once.

        Raises:
            ValueError: if the pixels' statistics are not three numbers, `test_mode` is unknown, the
                windows would leave gaps, `windows_per_batch` is not positive, or the head cannot be
                driven.
        """
        super().__init__()
        _require_three("MODEL.PIXEL_MEAN", pixel_mean)
        _require_three("MODEL.PIXEL_STD", pixel_std)
        if min(pixel_std) <= 0:
            raise ValueError(
                f"MODEL.PIXEL_STD is {list(pixel_std)}: choose numbers above 0, for images are "
                "divided by them"
            )
        if test_mode not in TEST_MODES:
            raise ValueError(f"TEST.MODE is {test_mode!r}; use one of {', '.join(TEST_MODES)}")
        if len(stride) != 2 or len(crop_size) != 2:
            raise ValueError(
                f"TEST.STRIDE is {list(stride)} and TEST.CROP_SIZE {list(crop_size)}: give a "
                "height and a width in each"
            )
        if any(not 0 < s <= c for s, c in zip(stride, crop_size, strict=True)):
            raise ValueError(
                f"TEST.STRIDE = {list(stride)} must lie between 1 and TEST.CROP_SIZE = "
                f"{list(crop_size)}: windows would leave pixels without a score"
            )
        if windows_per_batch < 1:
            raise ValueError(
                f"TEST.WINDOWS_PER_BATCH is {windows_per_batch}: choose at least 1 window, or as "
                "many as fit the device's memory"
            )
        require_drivable(sem_seg_head, backbone.output_shape(), backbone.size_divisibility)
        self.backbone = backbone
        self.sem_seg_head = sem_seg_head
        self.test_mode = test_mode
        self.crop_size = tuple(crop_size)
        self.stride = tuple(stride)
        self.windows_per_batch = windows_per_batch
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(3, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(3, 1, 1), persistent=False)
        names = self.state_dict().keys()
        self._loaded: frozenset[str] = frozenset()
        self.untrained = frozenset(name for name in names if not name.startswith("backbone."))
        self.unplaced: frozenset[str] = frozenset()
        self._warned = False

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        """Builds the parts that MODEL names and reads MODEL.PIXEL_*, MODEL.VFM and TEST.

        Args:
            cfg: the configuration.

        Returns:
            The arguments of ``__init__``.

        Raises:
            ValueError: if the backbone lacks one of IN_FEATURES, or the head cannot be built.
        """
        backbone = build_backbone(cfg)
        vfm, configured = cfg.MODEL.VFM, Pixels(cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD)
        pixels = pixel_statistics(vfm.NAME, vfm.PIXELS, configured)
        return {
            "backbone": backbone,
            "sem_seg_head": _build_head(cfg, backbone.output_shape()),
            "pixel_mean": pixels.mean,
            "pixel_std": pixels.std,
            "test_mode": cfg.TEST.MODE,
            "crop_size": cfg.TEST.CROP_SIZE,
            "stride": cfg.TEST.STRIDE,
            "windows_per_batch": cfg.TEST.WINDOWS_PER_BATCH,
        }

    @property
    def device(self) -> torch.device:
        """Where the model lies."""
        return self.pixel_mean.device

    @property
    def head(self) -> SegmentationHead:
        """``sem_seg_head``, as whatever computes losses or scores drives it."""
        backbone = self.backbone
        shapes, divisibility = backbone.output_shape(), backbone.size_divisibility
        return segmentation_head(self.sem_seg_head, shapes, divisibility)

    def forward(
        self, batched_inputs: list[dict]
    ) -> dict[str, torch.Tensor] | list[dict[str, torch.Tensor]]:
        """Trains or predicts, as ``self.training`` says.

        Args:
            batched_inputs: for each image a dict with ``image`` (3, H, W) in RGB, 0 .. 255; in
                training ``sem_seg`` (H, W) uint8 or int64; in evaluation ``height`` and ``width``
                of the wanted scores (default: H and W). Sizes may differ within the batch.

        Returns:
            In training the weighted losses by name, else for each image
            ``{"sem_seg": (C, height, width) float scores}``, computed without gradients.

        Raises:
            KeyError: in training, if an image comes without ``sem_seg``.
            ValueError: in training, if ``sem_seg`` has another size than its image.
            FloatingPointError: in training, if a prediction or a loss is not finite.
        """
        if self.training:
            return self.losses(batched_inputs)
        return self.inference(batched_inputs)

    def losses(self, batched_inputs: list[dict]) -> dict[str, torch.Tensor]:
        """Computes the losses of a batch; see `forward`.

        Args:
            batched_inputs: dicts with ``image`` and ``sem_seg``.

        Returns:
            The weighted losses by name.

        Raises:
            KeyError: if an image comes without ``sem_seg``.
            ValueError: if ``sem_seg`` has another size than its image.
            FloatingPointError: if a prediction or a loss is not finite; names the images.
        """
        # An estimate that needs no graph of this method, or a look at losses, trains nothing.
        if self.training and torch.is_grad_enabled():
            self.untrained = self.unplaced = frozenset()
        features, targets = self.features_and_targets(batched_inputs)
        try:
            _, losses = self.head(features, targets)
            _require_finite(losses)
        except FloatingPointError as error:
            images = ", ".join(inputs.get("file_name", "an image") for inputs in batched_inputs)
            raise FloatingPointError(f"on {images}: {error}") from error
        return losses

    def loss_divisors(self, batched_inputs: list[dict]) -> dict[str, torch.Tensor | float]:
        """What each of a batch's losses is divided by, for a trainer that passes it in parts.

        Args:
            batched_inputs: dicts with ``sem_seg``.

        Returns:
            Numbers or scalars by the losses' names, without the number of the prediction.
        """
        return self.head.loss_divisors([inputs["sem_seg"] for inputs in batched_inputs])

    def require_splittable(self) -> None:
        """Tries whether `loss_divisors` says what each of the head's losses is divided by.

        A head with a ``loss_divisors`` of its own is taken at its word.

        Raises:
            ValueError: if it does not; names the loss and the remedy.
        """
        backbone = self.backbone
        shapes, divisibility = backbone.output_shape(), backbone.size_divisibility
        require_splittable(self.sem_seg_head, shapes, divisibility)

    def features_and_targets(
        self, batched_inputs: list[dict]
    ) -> tuple[dict[str, torch.Tensor], SegmentationTargets]:
        """Checks and stacks a batch, and passes it through the backbone.

        Args:
            batched_inputs: dicts with ``image`` and ``sem_seg``.

        Returns:
            The backbone's maps, and the labels, with the head's ``ignore_value`` where images were
            padded.

        Raises:
            KeyError: if an image comes without ``sem_seg``.
            ValueError: if ``sem_seg`` has another size than its image, or holds a value that is
                neither a class nor ``ignore_value``.
        """
        for inputs in batched_inputs:
            if "sem_seg" not in inputs:
                raise KeyError(
                    f"no 'sem_seg' for {inputs.get('file_name', 'an image')}: the model is in "
                    "training mode, which needs labels. Use a mapper with is_train=True, or call "
                    "model.eval() to predict"
                )
            if inputs["sem_seg"].shape != inputs["image"].shape[-2:]:
                raise ValueError(
                    f"{inputs.get('file_name', 'an image')}: the image is "
                    f"{tuple(inputs['image'].shape[-2:])} and its sem_seg "
                    f"{tuple(inputs['sem_seg'].shape)}; the mapper must transform both alike"
                )
        divisor, head = self.backbone.size_divisibility, self.head
        images = self._normalised([inputs["image"] for inputs in batched_inputs])
        images = ImageList.from_tensors(images, divisor)
        labels = [inputs["sem_seg"] for inputs in batched_inputs]
        # Before the upload, so that the host does not wait for a GPU.
        classes = present_classes(labels, head.num_classes, head.ignore_value)
        pixels = ImageList.from_tensors(
            [label.to(self.device, non_blocking=True) for label in labels],
            divisor,
            pad_value=head.ignore_value,
        )
        return self.backbone(images.tensor), SegmentationTargets(pixels.tensor, classes)

    @torch.no_grad()
    def inference(self, batched_inputs: list[dict]) -> list[dict[str, torch.Tensor]]:
        """Scores each image by itself, so that a result does not depend on its batch.

        What is averaged over windows, and resized to the wanted size, are the head's scores (for
        Mask2Former sums of probabilities, for Detectron2's heads probabilities), not logits.

        Args:
            batched_inputs: dicts with ``image`` and maybe ``height`` and ``width``.

        Returns:
            ``{"sem_seg": (C, height, width)}`` for each image.
        """
        self._warn_of_other_weights()
        results = []
        for inputs in batched_inputs:
            (image,) = self._normalised([inputs["image"]])
            if self.test_mode == "slide":
                scores = sliding_average(
                    self._scores, image, self.crop_size, self.stride, self.windows_per_batch
                )
            else:
                scores = self._scores(image[None])[0]
            size = (inputs.get("height", image.shape[1]), inputs.get("width", image.shape[2]))
            scores = F.interpolate(scores[None], size, mode="bilinear", align_corners=False)[0]
            results.append({"sem_seg": scores})
        return results

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args) -> None:
        """Notes which tensors a load fills, and which it has left over.

        torch calls it for whichever parent is loaded. A checkpointer removes what has another shape
        before it loads, so that counts as missing.
        """
        super()._load_from_state_dict(state_dict, prefix, *args)
        names = frozenset(self.state_dict().keys())
        brought = {key.removeprefix(prefix) for key in state_dict if key.startswith(prefix)}
        # A buffer that is not in the state dict is a constant of the config: older files hold some.
        constants = {name for name, _ in self.named_buffers()}
        over = {name for name in brought - names - constants if name.startswith(_PARTS)}
        self._loaded |= names & brought
        self.untrained = names - self._loaded
        self.unplaced = frozenset(over | (set() if names <= brought else self.unplaced - names))

    def _warn_of_other_weights(self) -> None:
        """Says once that what is predicted is not what a training has made."""
        if self._warned or torch.compiler.is_compiling():
            return
        if not (self.untrained or self.unplaced) or not comm.is_main_process():
            return
        self._warned = True
        names = self.untrained or self.unplaced
        trouble = "has no place for tensors that were loaded"
        if self.untrained:
            trouble = "has tensors that are as they were initialised"
        logger.warning(
            "The model %s (%d, the first is %s), so its predictions are not those of a trained "
            "model: build it by fishertune_d2.engine.trained_model.build_trained(cfg, weights), "
            "which fills all of it",
            trouble,
            len(names),
            min(names),
        )

    def _normalised(self, images: list[torch.Tensor]) -> list[torch.Tensor]:
        uploaded = [image.to(self.device, non_blocking=True) for image in images]
        return [(image - self.pixel_mean) / self.pixel_std for image in uploaded]

    def _scores(self, images: torch.Tensor) -> torch.Tensor:
        """Scores normalised images or windows of one size (B, 3, H, W) -> (B, C, H, W) float32."""
        # Not an ImageList, which computes sizes on tensors: torch.export needs to know them.
        divisor = max(1, self.backbone.size_divisibility)
        bottom, right = (-side % divisor for side in images.shape[-2:])
        padded = F.pad(images, (0, right, 0, bottom))
        features = self.backbone(padded)
        scores, _ = self.head(features, image_size=padded.shape[-2:])
        # Autocast may give half precision, in which averages over windows would be rounded again.
        return scores[..., : images.shape[2], : images.shape[3]].float()


def _build_head(cfg: CfgNode, shapes: dict[str, ShapeSpec]) -> nn.Module:
    keys = cfg.MODEL.SEM_SEG_HEAD
    unknown = [name for name in keys.IN_FEATURES if name not in shapes]
    if unknown:  # some of Detectron2's heads go on without them
        raise ValueError(
            f"MODEL.SEM_SEG_HEAD.IN_FEATURES names {', '.join(unknown)}, which "
            f"{cfg.MODEL.BACKBONE.NAME} has not got: it has {', '.join(shapes)}"
        )
    if keys.NAME in DETECTRON2_HEADS and keys.COMMON_STRIDE < 1:
        smallest = min((shapes[name].stride for name in keys.IN_FEATURES), default=4)
        raise ValueError(
            f"MODEL.SEM_SEG_HEAD.COMMON_STRIDE is {keys.COMMON_STRIDE}: choose the smallest stride "
            f"of IN_FEATURES, {smallest} pixels"
        )
    try:
        return build_sem_seg_head(cfg, shapes)
    # Detectron2's heads name no key; those of its projects read keys that are not there.
    except (AssertionError, AttributeError, KeyError, ValueError) as error:
        raise ValueError(
            f"MODEL.SEM_SEG_HEAD.NAME {keys.NAME} cannot be built from the keys of the config: "
            f"{why_not_built(keys, error, WORKING_HEADS)}"
        ) from error


def _require_three(key: str, values: Sequence[float]) -> None:
    if len(values) != 3:
        raise ValueError(
            f"{key} is {list(values)}: give three numbers, one for each channel in the order of "
            "INPUT.FORMAT"
        )


def _require_finite(losses: dict[str, torch.Tensor]) -> None:
    values = torch.stack([loss.detach() for loss in losses.values()])
    # One sum, so that the host waits for a GPU once.
    if isfinite(values.sum()):
        return
    pairs = zip(losses, values.tolist(), strict=True)
    broken = [f"{name} is {value}" for name, value in pairs if not isfinite(value)]
    raise FloatingPointError(f"{', '.join(broken) or 'the sum of the losses overflows'}.")
