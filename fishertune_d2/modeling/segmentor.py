"""A backbone and a semantic segmentation head as a Detectron2 meta-architecture.

Shapes:
    B: images in the batch; C: classes
    H, W: an image as it enters the model; height, width: the same image on disk
"""

import logging
from collections.abc import Sequence
from math import isfinite

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, Backbone, build_backbone
from detectron2.structures import ImageList
from detectron2.utils import comm
from torch import Tensor, nn
from torch.nn import functional as F

from .build_head import build_head
from .heads import SegmentationHead, require_divisors, segmentation_head, try_out
from .sliding import sliding_average
from .targets import SegmentationTargets, present_classes
from .vfm_table import Pixels, pixel_statistics

logger = logging.getLogger(__name__)

TEST_MODES = ("whole", "slide")
# The parts that hold the weights. A checkpoint may hold other tensors, such as pixel_mean.
_PARTS = ("backbone.", "sem_seg_head.")


@META_ARCH_REGISTRY.register()
class VFMSegmentor(nn.Module):
    """Losses in training; class scores of whole images, or of sliding windows, in evaluation.

    Attributes:
        untrained: names of the state dict's tensors that no load has filled, of the backbone too.
            Before the first load these are the tensors of the head, because a backbone comes with
            its own weights. A training step empties it.
        unplaced: names of tensors of the backbone or the head that a load has brought and the model
            has no place for, such as the prompts of a tuning method that is not attached. A load
            that fills the whole model and leaves nothing over empties it, and so does a training
            step.
    """

    pixel_mean: Tensor
    pixel_std: Tensor

    @configurable
    def __init__(
        self,
        *,
        backbone: Backbone,
        sem_seg_head: nn.Module,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        test_mode: str,
        crop_size: Sequence[int],
        stride: Sequence[int],
        windows_per_batch: int = 1,
    ):
        """Puts the parts together. A value or a head that cannot work raises a ValueError.

        Args:
            backbone: images (B, 3, H, W) -> dict of feature maps.
            sem_seg_head: has the methods of `SegmentationHead`, or is one of Detectron2's heads
                that predict a logit for each class and pixel, see `PixelHead`.
            pixel_mean: mean of each channel, on the images' scale.
            pixel_std: standard deviation of each channel, on the images' scale.
            test_mode: "whole" or "slide".
            crop_size: height and width of a sliding window, in pixels.
            stride: pixels between windows, vertically and horizontally.
            windows_per_batch: how many windows of an image pass through the model at once.
        """
        super().__init__()
        _check_pixels(pixel_mean, pixel_std)
        _check_test(test_mode, crop_size, stride, windows_per_batch)
        try_out(segmentation_head(sem_seg_head, backbone))
        self.backbone = backbone
        self.sem_seg_head = sem_seg_head
        self.test_mode = test_mode
        self.crop_size = (crop_size[0], crop_size[1])
        self.stride = (stride[0], stride[1])
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
        """Builds the parts that MODEL names and reads MODEL.PIXEL_*, MODEL.VFM and TEST."""
        backbone = build_backbone(cfg)
        vfm, configured = cfg.MODEL.VFM, Pixels(cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD)
        pixels = pixel_statistics(vfm.NAME, vfm.PIXELS, configured)
        return {
            "backbone": backbone,
            "sem_seg_head": build_head(cfg, backbone.output_shape()),
            "pixel_mean": pixels.mean,
            "pixel_std": pixels.std,
            "test_mode": cfg.TEST.MODE,
            "crop_size": cfg.TEST.CROP_SIZE,
            "stride": cfg.TEST.STRIDE,
            "windows_per_batch": cfg.TEST.WINDOWS_PER_BATCH,
        }

    @property
    def device(self) -> torch.device:
        """The device of the model's tensors."""
        return self.pixel_mean.device

    @property
    def head(self) -> SegmentationHead:
        """``sem_seg_head`` with the methods that compute losses and scores."""
        return segmentation_head(self.sem_seg_head, self.backbone)

    def forward(self, batched_inputs: list[dict]) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        """Trains or predicts, depending on ``self.training``.

        Args:
            batched_inputs: for each image a dict with ``image`` (3, H, W) in RGB, 0 .. 255; in
                training ``sem_seg`` (H, W) uint8 or int64; in evaluation ``height`` and ``width``
                of the wanted scores (default: H and W). Sizes may differ within the batch.

        Returns:
            In training the weighted losses by name, else for each image
            ``{"sem_seg": (C, height, width) float scores}``, computed without gradients.
        """
        if self.training:
            return self.losses(batched_inputs)
        return self.inference(batched_inputs)

    def losses(self, batched_inputs: list[dict]) -> dict[str, Tensor]:
        """Returns the weighted losses of a batch, which `features_and_targets` checks, by name.

        Raises:
            FloatingPointError: if a prediction or a loss is not finite; names the images.
        """
        # Without a graph nothing is trained, for example in an estimate or a look at the losses.
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

    def loss_divisors(self, batched_inputs: list[dict]) -> dict[str, Tensor | float]:
        """Returns the divisor of each loss of a batch, see `SegmentationHead.loss_divisors`."""
        return self.head.loss_divisors([inputs["sem_seg"] for inputs in batched_inputs])

    def require_splittable(self) -> None:
        """Tries whether `loss_divisors` knows the divisor of each loss; else raises a ValueError.

        A head with its own ``loss_divisors`` is not tried.
        """
        losses = try_out(self.head)
        if losses:
            label = torch.zeros(1, 1, dtype=torch.int64)
            require_divisors(losses, self.head.loss_divisors([label]))

    def features_and_targets(
        self, batched_inputs: list[dict]
    ) -> tuple[dict[str, Tensor], SegmentationTargets]:
        """Checks and stacks a batch with labels, and computes its feature maps; see `forward`.

        Returns:
            The backbone's maps, and the labels, padded with the head's ``ignore_value``.

        Raises:
            KeyError: if an image comes without ``sem_seg``.
            ValueError: if ``sem_seg`` has another size than its image. A value that is neither a
                class nor ``ignore_value`` raises one, too.
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
        normalised = self._normalised([inputs["image"] for inputs in batched_inputs])
        images = ImageList.from_tensors(normalised, divisor)
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
    def inference(self, batched_inputs: list[dict]) -> list[dict[str, Tensor]]:
        """Returns the scores of each image, as `forward` does, whatever else is in the batch.

        The head's scores are averaged over windows and resized to the wanted size, not the logits.
        For Mask2Former they are sums of probabilities, for Detectron2's heads probabilities.
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

    def scores(self, image: Tensor) -> Tensor:
        """Scores one image as a whole, whatever TEST.MODE is.

        Args:
            image: (3, H, W), 0 .. 255.

        Returns:
            (C, H, W) float32.
        """
        (normalised,) = self._normalised([image])
        return self._scores(normalised[None])[0]

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args) -> None:
        """Notes which tensors a load fills, and which it leaves over.

        torch calls this method whichever parent is loaded. A checkpointer removes tensors of
        another shape before it loads, so these count as missing.
        """
        super()._load_from_state_dict(state_dict, prefix, *args)
        names = frozenset(self.state_dict().keys())
        brought = {key.removeprefix(prefix) for key in state_dict if key.startswith(prefix)}
        # A buffer outside the state dict is a constant of the config, which older files hold.
        constants = {name for name, _ in self.named_buffers()}
        over = {name for name in brought - names - constants if name.startswith(_PARTS)}
        self._loaded |= names & brought
        self.untrained = names - self._loaded
        self.unplaced = frozenset(over | (set() if names <= brought else self.unplaced - names))

    def _warn_of_other_weights(self) -> None:
        """Warns once if the predictions are not those of a trained model."""
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
            f"The model {trouble} ({len(names)}, the first is {min(names)}), so its predictions "
            "are not those of a trained model: build it by "
            "fishertune_d2.engine.trained_model.build_trained(cfg, weights), which fills every "
            "tensor"
        )

    def _normalised(self, images: list[Tensor]) -> list[Tensor]:
        uploaded = [image.to(self.device, non_blocking=True) for image in images]
        return [(image - self.pixel_mean) / self.pixel_std for image in uploaded]

    def _scores(self, images: Tensor) -> Tensor:
        """Scores normalised images or windows of one size (B, 3, H, W) -> (B, C, H, W) float32."""
        # An ImageList would compute sizes on tensors, and torch.export needs known sizes.
        divisor = max(1, self.backbone.size_divisibility)
        bottom, right = (-side % divisor for side in images.shape[-2:])
        padded = F.pad(images, (0, right, 0, bottom))
        features = self.backbone(padded)
        scores, _ = self.head(features, image_size=(padded.shape[-2], padded.shape[-1]))
        assert scores is not None  # a head without targets returns scores
        # Under autocast they may have half precision, which would round averages over windows.
        return scores[..., : images.shape[2], : images.shape[3]].float()


def _check_pixels(mean: Sequence[float], std: Sequence[float]) -> None:
    for key, values in (("MODEL.PIXEL_MEAN", mean), ("MODEL.PIXEL_STD", std)):
        if len(values) != 3:
            raise ValueError(
                f"{key} is {list(values)}: give three numbers, one for each channel in the order "
                "of INPUT.FORMAT"
            )
    if min(std) <= 0:
        raise ValueError(
            f"MODEL.PIXEL_STD is {list(std)}: choose numbers above 0, because images are divided "
            "by them"
        )


def _check_test(mode: str, crop: Sequence[int], stride: Sequence[int], batch: int) -> None:
    if mode not in TEST_MODES:
        raise ValueError(f"TEST.MODE is {mode!r}; use one of {', '.join(TEST_MODES)}")
    if len(stride) != 2 or len(crop) != 2:
        raise ValueError(
            f"TEST.STRIDE is {list(stride)} and TEST.CROP_SIZE {list(crop)}: give a height and a "
            "width in each"
        )
    if any(not 0 < s <= c for s, c in zip(stride, crop, strict=True)):
        raise ValueError(
            f"TEST.STRIDE = {list(stride)} must lie between 1 and TEST.CROP_SIZE = {list(crop)}: "
            "windows would leave pixels without a score"
        )
    if batch < 1:
        raise ValueError(
            f"TEST.WINDOWS_PER_BATCH is {batch}: choose at least 1 window, or as many as fit the "
            "device's memory"
        )


def _require_finite(losses: dict[str, Tensor]) -> None:
    values = torch.stack([loss.detach() for loss in losses.values()])
    # One sum, so that the host waits for a GPU once.
    if isfinite(values.sum()):
        return
    pairs = zip(losses, values.tolist(), strict=True)
    broken = [f"{name} is {value}" for name, value in pairs if not isfinite(value)]
    raise FloatingPointError(f"{', '.join(broken) or 'the sum of the losses overflows'}.")
