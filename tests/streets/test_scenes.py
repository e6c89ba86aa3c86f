"""The built-in street scenes: one seed, one label; honest perspective; safe files."""

import dataclasses
import functools
import math
import sys

import cv2
import numpy as np
import pytest

from fishertune_d2.streets import DOMAINS, ensure_streets, render_scene, write_streets
from fishertune_d2.streets import dataset as streets
from fishertune_d2.streets.canvas import Canvas, Projection, clip_near
from fishertune_d2.streets.render import paint
from fishertune_d2.streets.scene import draw_scene
from fishertune_d2.streets.weather import LOOKS, airlight
from fishertune_d2.streets.world import (
    CAR,
    PERSON,
    ROAD,
    SKY,
    TERRAIN,
    VEGETATION,
    VOID,
    Camera,
    Scene,
    Thing,
)

SMALL = (192, 96)
TINY = {("train", "day"): 2, ("val", "day"): 1, ("val", "fog"): 1}


rendered_once = functools.cache(render_scene)
"""For tests that compare scenes or files: no scene is rendered twice."""


def level_camera(pitch: float = 0.0, yaw: float = 0.0) -> Camera:
    return Camera(math.radians(60), 1.5, 0.0, pitch, yaw, 0.0)


def empty_scene(things: list[Thing], pitch: float = 0.0) -> Scene:
    return Scene(3, level_camera(pitch), 0.0, None, 0.5, (1, 1, 1, 1, 0), things=things)


def blank_canvas(camera: Camera, size: tuple[int, int]) -> Canvas:
    background = np.zeros((size[1], size[0], 3), np.uint8)
    return Canvas(Projection(camera, size), background, sun=None, lamps=False, snow=False)


# Determinism


@pytest.mark.parametrize("domain", DOMAINS)
def test_a_seed_gives_the_same_bytes(domain):
    np.random.seed(0)
    first = render_scene(7, domain, SMALL)
    np.random.seed(1)  # the global generator must not matter
    second = render_scene(7, domain, SMALL)
    for one, other in zip(first, second, strict=True):
        assert one.tobytes() == other.tobytes()


def test_seeds_differ():
    assert not np.array_equal(render_scene(1, size=SMALL)[1], render_scene(2, size=SMALL)[1])


@pytest.mark.parametrize("seed", range(4))
def test_the_label_does_not_depend_on_the_domain(seed):
    labels = [rendered_once(seed, domain, SMALL)[1] for domain in DOMAINS]
    for domain, label in zip(DOMAINS, labels, strict=True):
        np.testing.assert_array_equal(label, labels[0], err_msg=domain)


def test_shapes_types_and_an_unknown_domain():
    image, label = render_scene(5, "night", (200, 120))
    assert image.shape == (120, 200, 3) and image.dtype == np.uint8
    assert label.shape == (120, 200) and label.dtype == np.uint8
    assert set(np.unique(label)) <= {*range(19), VOID}
    with pytest.raises(ValueError, match="monsoon.*dusk"):
        render_scene(5, "monsoon")


# Perspective


def test_half_the_height_at_twice_the_distance():
    """Walls 2 m tall at 10 m and at 20 m: measured in label pixels, not in the formula."""
    rows = []
    for z in (10.0, 20.0):
        canvas = blank_canvas(level_camera(), (400, 400))
        wall = np.array([[-1, 0, z], [1, 0, z], [1, 2, z], [-1, 2, z]])
        canvas.surface(wall, (200, 200, 200), CAR)
        label = canvas.finish().label
        rows.append(int((label[:, 200] == CAR).sum()))
        focal = 200 / math.tan(math.radians(30))
        assert rows[-1] == pytest.approx(2 * focal / z, abs=1.5)
    assert rows[0] / rows[1] == pytest.approx(2, rel=0.06)


def test_a_person_model_keeps_its_height():
    for z in (8.0, 16.0):
        thing = Thing("person", 0.0, z, 0.3, 0.5, 0.5, 1.75, z, seed=4)
        label = paint(empty_scene([thing]), LOOKS["day"], (600, 400)).label
        rows = np.flatnonzero((label == PERSON).any(axis=1))
        focal = 300 / math.tan(math.radians(30))
        assert (rows[-1] - rows[0] + 1) * z / focal == pytest.approx(1.75, rel=0.05)


@pytest.mark.parametrize("pitch", [-0.05, 0.0, 0.1])
def test_the_horizon_is_where_the_ground_vanishes(pitch):
    projection = Projection(level_camera(pitch, yaw=0.1), (400, 200))
    far = projection.to_camera(np.array([[1e6 * math.tan(0.1), 0.0, 1e6], [0.0, 0.0, 1e6]]))
    np.testing.assert_allclose(projection.to_pixels(far)[:, 1], projection.horizon, atol=0.01)
    label = paint(empty_scene([], pitch), LOOKS["day"], (400, 200)).label
    assert not (label[: int(projection.horizon) - 40] == ROAD).any()
    assert not (label[int(projection.horizon) + 2 :] == SKY).any()


def test_depth_and_world_position_belong_to_the_label():
    """Every ground pixel lies at height 0, and projects back to itself."""
    scene = draw_scene(11)
    painting = paint(scene, LOOKS["day"], (256, 128))
    projection = Projection(scene.camera, (256, 128))
    ground = painting.label == ROAD
    assert ground.sum() > 1000
    assert np.abs(painting.world[ground][:, 1]).max() < 0.02
    rows, columns = np.nonzero(ground)
    back = projection.to_pixels(projection.to_camera(painting.world[ground].astype(float)))
    np.testing.assert_allclose(back, np.stack([columns, rows], axis=1), atol=0.05)
    assert np.isinf(painting.depth[painting.label == SKY]).all()
    assert np.isfinite(painting.depth[painting.label != SKY]).all()


def test_near_hides_far_whatever_the_order_of_the_list():
    near = Thing("car", 0.0, 9.0, 0.0, 4.3, 1.8, 1.5, 9.0, seed=1)
    behind = Thing("person", 0.0, 14.0, 0.0, 0.5, 0.5, 1.2, 14.0, seed=2)
    label = paint(empty_scene([behind, near]), LOOKS["day"], (400, 300)).label
    assert (label == CAR).any() and not (label == PERSON).any()
    for seed in range(5):
        distances = [thing.distance for thing in draw_scene(seed).things]
        assert distances == sorted(distances, reverse=True)


def test_clip_near_cuts_at_the_plane():
    square = np.array([[-1.0, 0, -1], [1, 0, -1], [1, 0, 3], [-1, 0, 3]])
    clipped = clip_near(square)
    assert clipped[:, 2].min() == pytest.approx(0.4) and clipped[:, 2].max() == 3
    assert len(clip_near(square - [0, 0, 5])) == 0


# Content


@pytest.fixture(scope="module")
def shares() -> np.ndarray:
    """(40, 19): the share of each class in the scenes that are tested on, painted small."""
    size = (128, 64)
    first = streets.FIRST_SEED["val"]
    labels = [paint(draw_scene(first + k), LOOKS["fog"], size).label for k in range(40)]
    return np.stack(
        [np.bincount(label.ravel(), minlength=256)[:19] / label.size for label in labels]
    )


def test_all_classes_occur_with_sensible_shares(shares):
    mean, present = shares.mean(axis=0), (shares > 0).mean(axis=0)
    assert (mean > 3e-4).all(), mean.round(4)
    assert (present > 0.1).all(), present
    assert mean[ROAD] == pytest.approx(0.3, abs=0.12)
    assert 0.04 < mean[SKY] < 0.3 and 0.05 < mean[VEGETATION] < 0.35
    assert shares.max() < 0.85, "one class fills a picture"


# Domains


@pytest.fixture(scope="module")
def by_domain() -> dict[str, np.ndarray]:
    return {
        domain: np.stack([rendered_once(seed, domain, SMALL)[0] for seed in range(6)]).astype(float)
        for domain in DOMAINS
    }


def test_night_and_dusk_are_darker_and_fog_is_flatter(by_domain):
    mean = {domain: images.mean() for domain, images in by_domain.items()}
    assert mean["night"] < 0.5 * mean["day"]
    assert mean["dusk"] < 0.6 * mean["day"]
    contrast = {domain: images.std(axis=(1, 2, 3)).mean() for domain, images in by_domain.items()}
    assert contrast["fog"] < 0.6 * contrast["day"]


@pytest.mark.parametrize("domain", DOMAINS[1:])
def test_every_domain_moves_away_from_day(by_domain, domain):
    gap = np.abs(by_domain[domain] - by_domain["day"]).mean()
    assert gap > 20, f"{domain} differs by {gap:.1f} of 255 only"


def test_snow_whitens_the_ground():
    scene = draw_scene(3)
    snow, day = (paint(scene, LOOKS[name], SMALL) for name in ("snow", "day"))
    ground = day.up & (day.label != VOID)
    assert snow.colour[ground].mean() > 1.3 * day.colour[ground].mean()


def test_fog_takes_contrast_with_depth():
    """Black and white targets at 10 m and 50 m, against Koschmieder's law."""
    pair = np.array([[[0.0] * 3, [255.0] * 3]], np.float32)
    contrasts = []
    for metres in (10.0, 50.0):
        seen = airlight(pair, np.full((1, 2), metres, np.float32), 60.0, np.full(3, 190.0))
        contrasts.append(float(seen[0, 1, 0] - seen[0, 0, 0]))
        assert contrasts[-1] == pytest.approx(255 * math.exp(-3 * metres / 60), rel=1e-4)
    assert airlight(
        pair, np.full((1, 2), np.inf, np.float32), 60.0, np.full(3, 190.0)
    ) == pytest.approx(190)


def test_lit_windows_shine_only_where_lamps_are_on():
    scene = draw_scene(3)
    assert paint(scene, LOOKS["night"], SMALL).glow.max() > 100
    assert paint(scene, LOOKS["day"], SMALL).glow.max() == 0


def test_sun_casts_shadows():
    """A bus 10 m ahead under a sun from the left darkens the ground to its right only."""
    bus = Thing("bus", 0.0, 12.0, 0.0, 4.0, 2.5, 3.0, 10.0, seed=1)
    lit = dataclasses.replace(empty_scene([bus], pitch=0.1), sun=(-0.7, 0.7, 0.14))
    painting, flat = (
        paint(scene, LOOKS["day"], (400, 200))
        for scene in (lit, dataclasses.replace(lit, sun=None))
    )
    ratio = painting.colour.mean(axis=2) / flat.colour.mean(axis=2)
    x, z = painting.world[..., 0], painting.world[..., 2]
    beside = (painting.label == TERRAIN) & (z > 11) & (z < 13)
    right = ratio[beside & (x > 2) & (x < 3)]
    left = ratio[beside & (x < -2) & (x > -3)]
    assert len(right) > 20 and len(left) > 20
    assert right.mean() < 0.7 * left.mean()


# Files


def test_folder_layout(tmp_path, capsys):
    root = tmp_path / "streets"
    write_streets(root, size=(96, 48), counts=TINY, workers=1)
    names = sorted(str(path.relative_to(root)) for path in root.rglob("*.png"))
    assert names == sorted(
        f"{kind}/{split}/{domain}/{domain}_000000_{index:06d}_{end}.png"
        for split, domain, index in (
            ("train", "day", 0),
            ("train", "day", 1),
            ("val", "day", 0),
            ("val", "fog", 0),
        )
        for kind, end in (("leftImg8bit", "leftImg8bit"), ("gtFine", "gtFine_labelTrainIds"))
    )
    image, label = render_scene(streets.FIRST_SEED["val"], "fog", (96, 48))
    stem = "val/fog/fog_000000_000000"
    read = cv2.imread(str(root / f"leftImg8bit/{stem}_leftImg8bit.png"))[..., ::-1]
    np.testing.assert_array_equal(read, image)
    read = cv2.imread(str(root / f"gtFine/{stem}_gtFine_labelTrainIds.png"), cv2.IMREAD_UNCHANGED)
    np.testing.assert_array_equal(read, label)
    assert capsys.readouterr().err == "", "a bar without a terminal"


def test_default_splits():
    assert set(streets.COUNTS) == {("train", "day"), *(("val", domain) for domain in DOMAINS)}
    train = range(streets.FIRST_SEED["train"], streets.COUNTS["train", "day"])
    assert streets.FIRST_SEED["val"] not in train, "tested on training scenes"


def test_an_interrupted_run_leaves_nothing(tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(streets, "_write_one", stop)
    with pytest.raises(KeyboardInterrupt):
        write_streets(tmp_path / "streets", size=(96, 48), counts=TINY, workers=1)
    assert list(tmp_path.iterdir()) == []


def test_ensure_keeps_this_version_and_replaces_another(tmp_path, monkeypatch):
    root = tmp_path / "streets"
    monkeypatch.setattr(
        streets,
        "write_streets",
        lambda root, **_: write_streets(root, size=(96, 48), counts=TINY, workers=1),
    )
    assert ensure_streets(root) == root
    picture = root / "leftImg8bit/val/fog/fog_000000_000000_leftImg8bit.png"
    made = picture.stat().st_mtime_ns
    ensure_streets(root)
    assert picture.stat().st_mtime_ns == made, "generated twice"
    (root / "old.txt").touch()
    monkeypatch.setattr(streets, "GENERATOR_VERSION", "next")
    ensure_streets(root)
    assert (root / streets.VERSION_FILE).read_text() == "next\n"
    assert not (root / "old.txt").exists(), "mixed two versions"
    assert [path.name for path in tmp_path.iterdir()] == ["streets"], "left something behind"


def test_the_faster_of_two_runs_wins(tmp_path, monkeypatch):
    """Another process finishes the same folder while this one renders."""
    root = tmp_path / "streets"
    render = streets._write_one

    def slow(folder, size, job):
        if not root.exists():
            root.mkdir()
            (root / streets.VERSION_FILE).write_text(streets.GENERATOR_VERSION)
            (root / "theirs").touch()
        render(folder, size, job)

    monkeypatch.setattr(streets, "_write_one", slow)
    write_streets(root, size=(96, 48), counts=TINY, workers=1)
    assert (root / "theirs").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["streets"]


def test_a_foreign_folder_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(FileExistsError, match="Remove it or name another"):
        write_streets(tmp_path, size=(96, 48), counts=TINY, workers=1)
    assert (tmp_path / "thesis.tex").exists()


def test_worker_processes_write_the_same_bytes(tmp_path):
    """The real pool, once: what its process writes is what this process renders."""
    write_streets(tmp_path / "streets", size=(96, 48), counts={("val", "rain"): 2})
    stem = "val/rain/rain_000000_000001"
    read = cv2.imread(str(tmp_path / f"streets/leftImg8bit/{stem}_leftImg8bit.png"))[..., ::-1]
    image, _ = render_scene(streets.FIRST_SEED["val"] + 1, "rain", (96, 48))
    np.testing.assert_array_equal(read, image)


def test_one_worker_is_this_process(tmp_path, monkeypatch):
    monkeypatch.setattr(streets, "ProcessPoolExecutor", None)
    threads = cv2.getNumThreads()
    write_streets(tmp_path / "streets", size=(96, 48), counts={("val", "fog"): 1}, workers=1)
    assert cv2.getNumThreads() == threads


def test_the_command_refuses_a_data_set_without_images(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["streets", "--output", str(tmp_path / "s"), "--images", "0"])
    with pytest.raises(SystemExit):
        streets.main()
    assert "--images is 0: choose at least 1" in capsys.readouterr().err
    assert not (tmp_path / "s").exists()


def test_the_command_refuses_a_data_set_of_another_size(tmp_path, monkeypatch):
    root = tmp_path / "streets"
    monkeypatch.setattr(sys, "argv", ["streets", "--output", str(root), "--images", "3"])
    write_streets(root, size=(96, 48), counts=TINY, workers=1)
    with pytest.raises(FileExistsError, match=f"{root} holds 2 images of train/day, not 3; .* Rem"):
        streets.main()
    assert ensure_streets(root) == root, "a training takes any size"
    assert ensure_streets(root, TINY) == root
