from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image
from sklearn.decomposition import PCA
from torch import nn

from fishertune_d2.analysis.features import patch_features, pca_pictures, read_images
from fishertune_d2.config import read_config
from fishertune_d2.data import register_sem_seg
from fishertune_d2.modeling import VFMBackbone


class _Segmentor(nn.Module):
    """What `patch_features` reads of one."""

    def __init__(self, backbone: VFMBackbone):
        super().__init__()
        self.backbone = backbone
        self.register_buffer("pixel_mean", torch.full((3, 1, 1), 100.0))
        self.register_buffer("pixel_std", torch.full((3, 1, 1), 50.0))
        self.device = torch.device("cpu")


def _images(*sizes: tuple[int, int]) -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    return [
        {"image": torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=generator)}
        for size in sizes
    ]


def test_features_are_what_timm_computes_for_every_family(small, small_family, one_thread):
    backbone = small(small_family, img_size=(28, 42))
    (image,) = _images((28, 42))
    pixels = (image["image"] - 100.0) / 50.0
    for index in (2, len(backbone.vit.blocks) - 1):
        module = backbone.vit.blocks[index] if index == 2 else None
        (features,) = patch_features(_Segmentor(backbone), [image], module)
        (expected,) = backbone.vit.forward_intermediates(
            pixels[None], indices=[index], norm=False, intermediates_only=True
        )  # (1, D, h, w)
        torch.testing.assert_close(features, expected[0].permute(1, 2, 0).detach())


def test_features_of_the_patch_embedding(small, small_family, one_thread):
    backbone = small(small_family, img_size=(28, 42))
    (image,) = _images((28, 42))
    (features,) = patch_features(_Segmentor(backbone), [image], backbone.vit.patch_embed)
    convolved = backbone.vit.patch_embed.proj((image["image"][None] - 100.0) / 50.0)
    torch.testing.assert_close(features, convolved[0].permute(1, 2, 0).detach())


def test_images_of_any_size_are_padded_as_the_backbone_does(small, one_thread):
    model = _Segmentor(small("dinov2_vitl"))
    images = _images((28, 42), (30, 40))
    shapes = [tuple(features.shape) for features in patch_features(model, images)]
    assert shapes == [(2, 3, 64), (3, 3, 64)]
    assert not model.backbone.vit.blocks[-1]._forward_hooks


def test_pictures_are_scikit_learns_components_up_to_sign():
    generator = torch.Generator().manual_seed(0)
    maps = [
        torch.randn(*size, 5, generator=generator) * torch.arange(1, 6) for size in [(4, 6), (3, 7)]
    ]
    pictures = pca_pictures(maps)
    assert [p.shape for p in pictures] == [(4, 6, 3), (3, 7, 3)]
    patches = np.concatenate([m.flatten(0, 1).numpy() for m in maps])
    expected = PCA(3).fit_transform(patches)
    found = np.concatenate([p.reshape(-1, 3) for p in pictures])
    assert (found.min(), found.max()) == (0, 1)
    for k in range(3):
        inside = (found[:, k] > 0) & (found[:, k] < 1)  # not clipped
        correlation = np.corrcoef(found[inside, k], expected[inside, k])[0, 1]
        assert abs(correlation) == pytest.approx(1, abs=1e-6)


def test_pictures_need_three_directions():
    with pytest.raises(ValueError, match="6 patches of 2 channels"):
        pca_pictures([torch.zeros(2, 3, 2)])


def test_images_are_spread_over_the_data_set(tmp_path):
    for folder in ("images", "labels"):
        (tmp_path / folder).mkdir()
    for i in range(5):
        Image.new("RGB", (8, 4), (i, i, i)).save(tmp_path / "images" / f"{i}.png")
        Image.new("L", (8, 4)).save(tmp_path / "labels" / f"{i}.png")
    register_sem_seg("spread", tmp_path / "images", tmp_path / "labels", ["ground"])
    cfg = read_config(str(Path(__file__).parents[2] / "configs/demo.yaml"))
    read = [int(item["image"][0, 0, 0]) for item in read_images(cfg, "spread", 3)]
    assert read == [0, 2, 4]
    assert len(read_images(cfg, "spread", 9)) == 5
    DatasetCatalog.remove("spread")
    MetadataCatalog.remove("spread")
