"""The table of public data sets: ``DATASETS``. A new data set is one entry here.

datasets/README.md shows their folders, sources and peculiarities.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from fishertune_d2.data.dataset_description import Published, SemSegDataset, datasets_root
from fishertune_d2.data.labels import LABEL_SPACES
from fishertune_d2.files import cache_root

_log = logging.getLogger(__name__)

# Rein's test sizes; ACDC's is the test size of Rein's 512 x 512 configs.
_HALF_CITYSCAPES = (1024, 512)
_FULL_BDD = (1280, 720)
_HALF_HD = (960, 540)

_HD = ((1920, 1080),)


def _streets_root() -> Path:
    """Draws the built-in scenes if they are not there yet, and returns their folder."""
    from fishertune_d2.streets import ensure_streets  # here: most runs never need it

    root = datasets_root() / "streets"
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:  # data folders are often mounted read-only
        root = cache_root() / "streets"
        _log.info("DETECTRON2_DATASETS cannot hold the built-in data (%s): using %s", error, root)
    return ensure_streets(root)


def _streets(split: str, domain: str, pairs: int) -> SemSegDataset:
    return SemSegDataset(
        name=f"streets_{domain}_{split}",
        image_dir=f"leftImg8bit/{split}/{domain}",
        label_dir=f"gtFine/{split}/{domain}",
        image_suffixes=("_leftImg8bit.png",),
        label_suffixes=("_gtFine_labelTrainIds.png",),
        label_map="train_ids",
        domain=f"streets/{domain}",
        published=Published(pairs, sizes=((512, 256),)),
        root=_streets_root,
    )


def _is_dusk(stem: str) -> bool:
    return stem.startswith("0001TP")  # the one CamVid sequence that was filmed at dusk


def _is_day(stem: str) -> bool:
    return not _is_dusk(stem)


def _camvid(
    name: str, split: str, domain: str, keep: Callable[[str], bool], pairs: int
) -> SemSegDataset:
    return SemSegDataset(
        name=name,
        image_dir=f"CamVid/{split}",
        label_dir=f"CamVid/{split}annot",
        label_map="camvid",
        label_space=LABEL_SPACES["camvid11"],
        domain=domain,
        keep=keep,
        published=Published(pairs, sizes=((480, 360),)),
    )


def _cityscapes(split: str, pairs: int) -> SemSegDataset:
    return SemSegDataset(
        name=f"cityscapes_{split}",
        image_dir=f"cityscapes/leftImg8bit/{split}",
        label_dir=f"cityscapes/gtFine/{split}",
        image_suffixes=("_leftImg8bit.png",),
        label_suffixes=("_gtFine_labelIds.png",),
        label_map="label_ids",
        domain="cityscapes",
        test_size=_HALF_CITYSCAPES,
        published=Published(
            pairs,
            sizes=((2048, 1024),),
            absent=(),
            shares={"road": 32.7, "building": 20.1, "vegetation": 14.3},
        ),
    )


def _bdd100k(split: str, pairs: int) -> SemSegDataset:
    return SemSegDataset(
        name=f"bdd100k_{split}",
        image_dir=f"bdd100k/images/10k/{split}",
        label_dir=f"bdd100k/labels/sem_seg/masks/{split}",
        label_map="train_ids",
        domain="bdd100k",
        test_size=_FULL_BDD,
        published=Published(pairs, sizes=((1280, 720),)),
    )


def _mapillary(split: str, folder: str, pairs: int) -> tuple[SemSegDataset, SemSegDataset]:
    """Returns the data set with Rein's map, and with HRDA's map."""
    rein = SemSegDataset(
        name=f"mapillary_{split}",
        image_dir=f"mapillary/{folder}/images",
        label_dir=f"mapillary/{folder}/labels",
        # The archive of version 2.0 holds the labels of 1.2 too, one folder deeper.
        other_dirs=((f"mapillary/{folder}/images", f"mapillary/{folder}/v1.2/labels"),),
        label_map="mapillary_v1.2_rein",
        domain="mapillary",
        test_size=_HALF_CITYSCAPES,
        halve_labels=True,
        published=Published(pairs),
    )
    return rein, replace(rein, name=f"mapillary_{split}_hrda", label_map="mapillary_v1.2_hrda")


# The sequences of train and val that show each condition; no sequence shows two. In trees without
# folders of conditions only the files' names tell the condition. Source: the lists of all 2,006
# images in AlaaAnani/adaptive-hierarchical-certification (data/list/acdc). CLOUDS lists the same
# 406 images of val, and naver/oasis counts the images of the same sequences.
_ACDC_SEQUENCES = {
    "fog": (
        "GOPR0475", "GP010475", "GP020475", "GOPR0476", "GP010476", "GOPR0477", "GP010477",
        "GOPR0478", "GP020478", "GOPR0479", "GOPR0480",
    ),
    "night": ("GOPR0351", "GOPR0356", "GOPR0376", "GP010376", "GP010397", "GP020397"),
    "rain": (
        "GOPR0400", "GP010400", "GP020400", "GP030400", "GOPR0402", "GP010402", "GP020402",
        "GP030402", "GOPR0571", "GP020571", "GOPR0572",
    ),
    "snow": (
        "GOPR0122", "GP010122", "GP030176", "GP040176", "GP050176", "GOPR0604", "GOPR0605",
        "GOPR0606", "GP020606", "GOPR0607", "GP010607", "GP020607",
    ),
}  # fmt: skip


def _of_sequences(sequences: Sequence[str]) -> Callable[[str], bool]:
    """Picks "x/SEQUENCE_frame_000123" by its sequence."""
    return lambda stem: stem.rpartition("/")[2].partition("_")[0] in sequences


def _acdc(split: str, counts: Mapping[str, int]) -> list[SemSegDataset]:
    """Returns a data set for all conditions, and a data set for each condition."""
    flat = (f"acdc/rgb_anon/{split}", f"acdc/gt/{split}")  # as HRDA, MIC and VLTSeg keep it
    every = SemSegDataset(
        name=f"acdc_{split}",
        image_dir=f"acdc/rgb_anon/*/{split}",
        label_dir=f"acdc/gt/*/{split}",
        other_dirs=(flat,),
        image_suffixes=("_rgb_anon.png",),
        label_suffixes=("_gt_labelTrainIds.png",),
        label_map="train_ids",
        domain="acdc",
        test_size=_HALF_HD,
        published=Published(sum(counts.values()), sizes=_HD),
    )
    single = [
        replace(
            every,
            name=f"acdc_{condition}_{split}",
            image_dir=f"acdc/rgb_anon/{condition}/{split}",
            label_dir=f"acdc/gt/{condition}/{split}",
            keep=_of_sequences(_ACDC_SEQUENCES[condition]),
            domain=f"acdc/{condition}",
            published=Published(pairs, sizes=_HD),
        )
        for condition, pairs in counts.items()
    ]
    return [every, *single]


DATASETS: tuple[SemSegDataset, ...] = (
    SemSegDataset(
        name="gtav_train",
        image_dir="gta/images",
        label_dir="gta/labels",
        label_map="label_ids",
        domain="gtav",
        drop_mismatched=True,  # 62 of the 24,966 published pairs differ in size
        published=Published(
            24_904,
            sizes=((1914, 1052), (1914, 1046)),
            absent=(),
            shares={"road": 32.1, "building": 16.9, "sky": 13.5, "sidewalk": 8.3},
        ),
    ),
    SemSegDataset(
        name="synthia_train",
        image_dir="synthia/RGB",
        label_dir="synthia/GT/LABELS",
        label_map="synthia",
        domain="synthia",
        published=Published(
            9_400,
            sizes=((1280, 760),),
            absent=("terrain", "truck", "train"),
            shares={"building": 29.3, "sidewalk": 19.3, "road": 18.4, "vegetation": 10.3},
        ),
    ),
    _cityscapes("train", 2_975),
    _cityscapes("val", 500),
    _bdd100k("train", 7_000),
    _bdd100k("val", 1_000),
    *_mapillary("train", "training", 18_000),
    *_mapillary("val", "validation", 2_000),
    *_acdc("train", {"fog": 400, "night": 400, "rain": 400, "snow": 400}),
    *_acdc("val", {"fog": 100, "night": 106, "rain": 100, "snow": 100}),
    SemSegDataset(
        name="foggy_zurich",
        image_dir="Foggy_Zurich/RGB",
        label_dir="Foggy_Zurich/gt_labelTrainIds",
        image_list="Foggy_Zurich/lists_file_names/RGB_testv2_filenames.txt",
        label_map="train_ids",
        domain="foggy_zurich",
        test_size=_HALF_HD,
        published=Published(40, sizes=_HD),
    ),
    SemSegDataset(
        name="foggy_driving",
        image_dir="Foggy_Driving/leftImg8bit",
        label_dir="Foggy_Driving/gt*",  # gtFine holds 33, gtCoarse the other 68
        image_suffixes=("_leftImg8bit.png",),
        label_suffixes=("_gtFine_labelIds.png", "_gtCoarse_labelIds.png"),
        label_map="label_ids",
        domain="foggy_driving",
        test_size=_HALF_HD,
        published=Published(101),
    ),
    SemSegDataset(
        name="dark_zurich_val",
        image_dir="dark_zurich/rgb_anon/val",
        label_dir="dark_zurich/gt/val",
        image_suffixes=("_rgb_anon.png",),
        label_suffixes=("_gt_labelTrainIds.png",),
        label_map="train_ids",
        domain="dark_zurich",
        test_size=_HALF_HD,
        published=Published(50, sizes=_HD),
    ),
    SemSegDataset(
        name="nighttime_driving",
        image_dir="NighttimeDrivingTest/leftImg8bit/test",
        label_dir="NighttimeDrivingTest/gtCoarse_daytime_trainvaltest/test",
        image_suffixes=("_leftImg8bit.png",),
        label_suffixes=("_gtCoarse_labelTrainIds.png",),
        label_map="train_ids",
        domain="nighttime_driving",
        test_size=_HALF_HD,
        published=Published(50, sizes=_HD),
    ),
    _camvid("camvid_day_train", "train", "camvid/day", _is_day, 305),
    _camvid("camvid_day_val", "val", "camvid/day", _is_day, 101),
    _camvid("camvid_day_test", "test", "camvid/day", _is_day, 171),
    _camvid("camvid_dusk_dev", "train", "camvid/dusk", _is_dusk, 62),
    _camvid("camvid_dusk_test", "test", "camvid/dusk", _is_dusk, 62),
    _streets("train", "day", 240),
    *(_streets("val", domain, 40) for domain in ("day", "dusk", "night", "fog", "rain", "snow")),
)
