"""Maps a data set's dict to tensors: reads, augments and pads image and label.

Shapes: H, W are the height and width after augmentation, in pixels.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode, configurable
from detectron2.data import DatasetCatalog
from detectron2.data import transforms as T
from detectron2.projects.point_rend import ColorAugSSDTransform
from PIL import Image

from fishertune_d2.data.image_files import (
    DatasetError,
    load_image,
    read_label,
    size_remedy,
    to_array,
)
from fishertune_d2.data.image_shifts import shift_image
from fishertune_d2.data.protocols import Protocol, read_test_sizes

# Draws of size and crop until one shows enough of a rare class, as in DAFormer and tqdm.
_CROPS_FOR_RARE_CLASS = 10


class ColorJitter(T.Augmentation):
    """SSD's random brightness, contrast, saturation and hue, on uint8 images."""

    def __init__(self, image_format: str):
        super().__init__()
        self.image_format = image_format

    def get_transform(self, image: np.ndarray) -> T.Transform:
        """Returns the transform; it draws its random numbers when it is applied."""
        return ColorAugSSDTransform(self.image_format)


class SegmentationMapper:
    """Turns a data set's dict into the segmentor's input.

    Training: resize to a random short edge, crop, colour jitter, flip, pad to the crop's size. The
    crop is chosen on the label, and only that part of the image is resized. An image without a
    label gets a copy without colour jitter, which a teacher labels (self-training).
    Test: resize into the data set's ``test_size``, or into the protocol's. The evaluator reads the
    label from disk, at its own size or halved, with the label map that the mapper gives.
    """

    @configurable
    def __init__(
        self,
        is_train: bool,
        *,
        resize: T.ResizeShortestEdge | None = None,
        crop: T.RandomCrop_CategoryAreaConstraint | None = None,
        augmentations: Sequence[T.Augmentation] = (),
        image_format: str = "RGB",
        pad_to: tuple[int, int] | None = None,
        pad_value: Sequence[float] = (0.0, 0.0, 0.0),
        ignore_label: int = 255,
        test_sizes: Mapping[str, tuple[int, int] | None] | None = None,
        native_labels: bool = False,
        label_maps: Mapping[str, str] | None = None,
        rare_class_crop_pixels: int = 0,
    ):
        """Stores the augmentations.

        Args:
            is_train: Whether labels are loaded, and image and label augmented.
            resize: Draws a short edge. Images are resized as in Pillow (bilinear, with
                antialiasing), labels by nearest neighbours. None keeps the files' size.
            crop: Draws a part of the resized label. None keeps the whole label.
            augmentations: Applied next, in this order, to image and label.
            image_format: "RGB" or "BGR".
            pad_to: (height, width) up to which smaller crops are padded on the right and at the
                bottom, so that a batch stacks; None pads nothing.
            pad_value: Colour of the padding, 0..255: MODEL.PIXEL_MEAN. The model sees it rounded,
                as about 0; under MODEL.VFM.PIXELS authors it subtracts the authors' mean, and sees
                the difference.
            ignore_label: Label of the padding.
            test_sizes: (width, height) that replaces a data set's own ``test_size``, keyed by the
                data set's name; None tests at the file's size.
            native_labels: Score at the label files' size even where labels are usually halved.
            label_maps: Name in `LABEL_MAPS` with which a test set is scored in place of its own,
                keyed by the data set's name.
            rare_class_crop_pixels: Pixels of the class ``drawn_for`` that a crop needs; else size
                and crop are drawn again, at most ten times. 0 takes the first crop.

        Raises:
            ValueError: if a name in ``test_sizes`` is not registered.
        """
        self.test_sizes = dict(test_sizes or {})
        unknown = self.test_sizes.keys() - set(DatasetCatalog.list())
        if unknown:
            raise ValueError(
                f"Test sizes are given for {sorted(unknown)}, but no such data set is registered; "
                "correct the name."
            )
        self.native_labels = native_labels
        self.label_maps = dict(label_maps or {})
        self.is_train = is_train
        self.resize = resize
        self.crop = crop
        self.augmentations = T.AugmentationList(list(augmentations))
        self.image_format = image_format
        self.pad_to = pad_to
        self.pad_value = np.round(pad_value).astype(np.uint8)
        self.ignore_label = ignore_label
        self.rare_class_crop_pixels = rare_class_crop_pixels

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> dict[str, Any]:
        """Reads cfg.INPUT, cfg.DATALOADER, cfg.MODEL and, by `Protocol.from_config`, cfg.TEST."""
        crop, ignore_label = cfg.INPUT.CROP, cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE
        protocol, registered = Protocol.from_config(cfg), DatasetCatalog.list()
        if crop.ENABLED and crop.TYPE != "absolute":
            raise ValueError(
                f"INPUT.CROP.TYPE is {crop.TYPE!r}, but a batch needs crops of one size: set it "
                "to 'absolute' and INPUT.CROP.SIZE to pixels."
            )
        resize, cropping, augmentations = None, None, []
        if is_train:
            resize = T.ResizeShortestEdge(
                cfg.INPUT.MIN_SIZE_TRAIN,
                cfg.INPUT.MAX_SIZE_TRAIN,
                cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING,
            )
            if crop.ENABLED:
                cropping = T.RandomCrop_CategoryAreaConstraint(
                    crop.TYPE, crop.SIZE, crop.SINGLE_CATEGORY_MAX_AREA, ignore_label
                )
            if cfg.INPUT.COLOR_AUG_SSD:
                augmentations.append(ColorJitter(cfg.INPUT.FORMAT))
            if cfg.INPUT.RANDOM_FLIP != "none":
                augmentations.append(
                    T.RandomFlip(
                        horizontal=cfg.INPUT.RANDOM_FLIP == "horizontal",
                        vertical=cfg.INPUT.RANDOM_FLIP == "vertical",
                    )
                )
        return {
            "is_train": is_train,
            "resize": resize,
            "crop": cropping,
            "augmentations": augmentations,
            "image_format": cfg.INPUT.FORMAT,
            "pad_to": tuple(crop.SIZE) if is_train and crop.ENABLED else None,
            "pad_value": cfg.MODEL.PIXEL_MEAN,
            "ignore_label": ignore_label,
            "test_sizes": read_test_sizes(cfg.TEST.SIZES) | protocol.sizes_of(registered),
            "native_labels": protocol.native_labels,
            "label_maps": protocol.label_maps_of(registered),
            "rare_class_crop_pixels": cfg.DATALOADER.RARE_CLASS_CROP_PIXELS,
        }

    def __call__(self, dataset_dict: dict[str, Any]) -> dict[str, Any]:
        """Maps one dict of `load_pairs`, in training maybe with the class ``drawn_for``.

        Returns:
            A copy with ``image``, (3, H, W) uint8, and in training ``sem_seg``, (H, W) uint8
            train ids; without a ``sem_seg_file_name``, ``clean_image`` (3, H, W) uint8 in its
            place, and ``valid_size``, the height and width that are no padding. ``height`` and
            ``width`` are the label file's; at test, where ``halve_label`` is true, they are half of
            them, rounded down.

        Raises:
            DatasetError: if a file cannot be read, holds a label out of range, or, in training, an
                image and its label differ in size.
        """
        image = load_image(dataset_dict["file_name"])
        if "shift" in dataset_dict:
            shift, file = dataset_dict["shift"], dataset_dict["file_name"]
            image = Image.fromarray(shift_image(np.asarray(image), shift, file))
        if not self.is_train:
            return {**dataset_dict, **self._as_scored(dataset_dict, image)}
        if "sem_seg_file_name" not in dataset_dict:
            return {**dataset_dict, **self._unlabelled(image)}

        label = read_label(dataset_dict["sem_seg_file_name"], dataset_dict["label_map"])
        if image.size != label.shape[::-1]:
            pair = dataset_dict["file_name"], dataset_dict["sem_seg_file_name"]
            raise DatasetError(
                f"{pair[0]} has the size {image.width} x {image.height}, and its label {pair[1]} "
                f"{label.shape[1]} x {label.shape[0]}. {size_remedy(*pair)}"
            )
        image, label = self._resized_part(image, label, dataset_dict.get("drawn_for"))
        augmented = T.AugInput(to_array(image, self.image_format), sem_seg=label)
        self.augmentations(augmented)
        pixels, label = self._pad(augmented.image, augmented.sem_seg)
        return {
            **dataset_dict,
            "image": to_tensor(pixels),
            "sem_seg": torch.from_numpy(label.copy()),  # Pillow's memory is read-only
        }

    def _unlabelled(self, image: Image.Image) -> dict[str, Any]:
        """Augments an image without a label, and gives its copy all but the colour jitter."""
        nothing = np.full((image.height, image.width), self.ignore_label, np.uint8)
        image, nothing = self._resized_part(image, nothing)
        pixels = to_array(image, self.image_format)
        augmented = T.AugInput(pixels.copy(), sem_seg=nothing)
        for transform in self.augmentations(augmented).transforms:
            if not isinstance(transform, ColorAugSSDTransform):
                pixels = transform.apply_image(pixels)
        return {
            "image": to_tensor(self._pad(augmented.image, nothing)[0]),
            "clean_image": to_tensor(self._pad(pixels, nothing)[0]),
            "valid_size": nothing.shape,
        }

    def _resized_part(
        self, image: Image.Image, label: np.ndarray, drawn_for: int | None = None
    ) -> tuple[Image.Image, np.ndarray]:
        """Draws a size and a part of the label, and resizes only that part of the image."""
        # The pixels differ by at most 2 grey levels from that part of the whole resized image: each
        # of the two passes, along rows and along columns, may round to the other neighbour.
        wanted = self.rare_class_crop_pixels if drawn_for is not None else 0
        for _ in range(_CROPS_FOR_RARE_CLASS if wanted else 1):
            part, (left, top, right, bottom), (width, height) = self._draw_part(label)
            if np.count_nonzero(part == drawn_for) >= wanted:
                break
        across, down = image.width / width, image.height / height
        box = (
            left * across,
            top * down,
            min(right * across, image.width),  # a product rounds up
            min(bottom * down, image.height),
        )
        size = (right - left, bottom - top)
        return image.resize(size, Image.Resampling.BILINEAR, box=box), part

    def _draw_part(
        self, label: np.ndarray
    ) -> tuple[np.ndarray, tuple[int, int, int, int], tuple[int, int]]:
        """Returns a part of the resized label, its box there, and the resized (width, height)."""
        if self.resize is not None:
            label = self.resize.get_transform(label).apply_segmentation(label)
        height, width = label.shape
        if self.crop is None:
            return label, (0, 0, width, height), (width, height)
        part = self.crop.get_transform(label, label)
        box = (part.x0, part.y0, part.x0 + part.w, part.y0 + part.h)
        return part.apply_segmentation(label), box, (width, height)

    def _as_scored(self, item: dict[str, Any], image: Image.Image) -> dict[str, Any]:
        """Returns the image at its test size, and how its label is read for the score."""
        name = item.get("dataset_name", "")
        size = self.test_sizes.get(name, item.get("test_size"))
        halve = item.get("halve_label", False) and not self.native_labels
        parts = 2 if halve else 1
        fitted = image if size is None else fit_into(image, size)
        return {
            "image": to_tensor(to_array(fitted, self.image_format)),
            "test_size": size,
            "halve_label": halve,
            "height": item["height"] // parts,
            "width": item["width"] // parts,
            **({"label_map": self.label_maps[name]} if name in self.label_maps else {}),
        }

    def _pad(self, image: np.ndarray, label: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if self.pad_to is None or label.shape == self.pad_to:
            return image, label
        height, width = label.shape
        padded = np.tile(self.pad_value, (*self.pad_to, 1))
        padded[:height, :width] = image
        padded_label = np.full(self.pad_to, self.ignore_label, label.dtype)
        padded_label[:height, :width] = label
        return padded, padded_label


def fit_into(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Resizes an RGB image to the largest size of its aspect ratio inside (width, height)."""
    # Scores depend on these pixels, so they equal those of Detectron2's ResizeShortestEdge.
    height, width = T.ResizeShortestEdge.get_output_shape(
        image.height, image.width, min(size), max(size)
    )
    return image.resize((width, height), Image.Resampling.BILINEAR)


def to_tensor(image: np.ndarray) -> torch.Tensor:
    """(H, W, 3) array to (3, H, W) tensor; flips leave negative strides, which torch refuses."""
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))
