import json

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import SemSegEvaluator
from detectron2.utils import comm
from PIL import Image
from torchmetrics.classification import MulticlassJaccardIndex

from fishertune_d2.config import default_config
from fishertune_d2.data.image_files import DatasetError
from fishertune_d2.data.labels import LABEL_SPACES
from fishertune_d2.data.registration import register_sem_seg
from fishertune_d2.evaluation import DomainGeneralizationEvaluator
from fishertune_d2.evaluation.evaluator import class_ious, confusion_matrix

CLASSES = ["a", "b", "c", "d", "e"]


@pytest.fixture
def scored(tmp_path):
    """Six images with labels 0 to 2 and 255, and scores for five classes; class 4 never wins."""
    rng = np.random.default_rng(3)
    for folder in ("images", "labels"):
        (tmp_path / folder).mkdir()
    scores, labels = [], []
    for k in range(6):
        label = rng.choice([0, 1, 2, 255], (9, 11), p=[0.4, 0.3, 0.2, 0.1]).astype(np.uint8)
        Image.new("RGB", (11, 9), (k, k, k)).save(tmp_path / f"images/{k}.png")
        Image.fromarray(label).save(tmp_path / f"labels/{k}.png")
        logits = rng.normal(size=(5, 9, 11)).astype(np.float32)
        logits[4] -= 100
        for c in range(3):
            logits[c] += 1.5 * (label == c)
        scores.append(torch.from_numpy(logits))
        labels.append(torch.from_numpy(label.astype(np.int64)))
    register_sem_seg("own_scored", tmp_path / "images", tmp_path / "labels", CLASSES)
    yield DatasetCatalog.get("own_scored"), scores, labels
    DatasetCatalog.remove("own_scored")
    MetadataCatalog.remove("own_scored")


def evaluate(scored, indices=range(6), **kwargs):
    dicts, scores, _ = scored
    evaluator = DomainGeneralizationEvaluator("own_scored", **kwargs)
    for k in indices:
        evaluator.process([dicts[k]], [{"sem_seg": scores[k]}])
    return evaluator


def test_union_rule_is_torchmetrics(scored):
    result = evaluate(scored, class_rule="union").evaluate()["sem_seg"]
    _, scores, labels = scored
    for average in ("macro", "none"):
        metric = MulticlassJaccardIndex(num_classes=5, ignore_index=255, average=average)
        for score, label in zip(scores, labels, strict=True):
            metric.update(score.argmax(0), label)
        reference = metric.compute()
        if average == "macro":
            assert result["mIoU"] == pytest.approx(100 * reference.item(), abs=1e-4)
    for name, iou in zip(CLASSES[:4], reference.tolist(), strict=False):
        assert result[f"IoU-{name}"] == pytest.approx(100 * iou, abs=1e-4)
    assert result["IoU-d"] == 0  # predicted, never labelled
    assert "IoU-e" not in result


def test_present_rule_averages_over_labelled_classes(scored):
    result = evaluate(scored, class_rule="present").evaluate()["sem_seg"]
    _, scores, labels = scored
    prediction = torch.stack([s.argmax(0) for s in scores])
    label = torch.stack(labels)
    valid, ious = label != 255, []
    for c in range(3):
        both = ((prediction == c) & (label == c)).sum().item()
        either = (((prediction == c) | (label == c)) & valid).sum().item()
        ious.append(100 * both / either)
        assert result[f"IoU-{CLASSES[c]}"] == pytest.approx(ious[-1])
    assert result["mIoU"] == pytest.approx(np.mean(ious))
    assert set(result) == {"mIoU", "IoU-a", "IoU-b", "IoU-c"}
    json.dumps(result, allow_nan=False)


def test_present_rule_is_detectron2s(scored):
    result = evaluate(scored, class_rule="present").evaluate()["sem_seg"]
    reference = SemSegEvaluator(
        "own_scored", sem_seg_loading_fn=lambda path, dtype: np.array(Image.open(path), dtype)
    )
    reference.reset()
    for item, score in zip(scored[0], scored[1], strict=True):
        reference.process([item], [{"sem_seg": score}])
    expected = reference.evaluate()["sem_seg"]
    for name, iou in result.items():
        assert iou == pytest.approx(expected[name], rel=1e-12)
    left_out = {name for name in expected if name.startswith("IoU-")} - result.keys()
    assert all(np.isnan(expected[name]) for name in left_out)


def test_the_first_of_equal_scores_is_the_prediction(scored):
    dicts, _, labels = scored
    rng = np.random.default_rng(1)
    evaluator = DomainGeneralizationEvaluator("own_scored")
    expected = 0
    for item, label in zip(dicts, labels, strict=True):
        scores = rng.integers(0, 3, (5, 9, 11)).astype(np.float32)
        evaluator.process([item], [{"sem_seg": torch.from_numpy(scores)}])
        prediction = scores.argmax(axis=0).astype(np.uint8)  # numpy's is the first
        expected = expected + confusion_matrix(label.numpy().astype(np.uint8), prediction, 5)
    assert np.array_equal(evaluator.confusion, expected)


def test_reset_forgets(scored):
    evaluator = evaluate(scored)
    first = evaluator.evaluate()
    evaluator.reset()
    dicts, scores, _ = scored
    for k in range(6):
        evaluator.process([dicts[k]], [{"sem_seg": scores[k]}])
    assert evaluator.evaluate() == first


def test_confusion_counts_against_a_loop():
    rng = np.random.default_rng(0)
    labels = rng.choice([0, 1, 2, 255], (6, 7)).astype(np.uint8)
    predictions = rng.choice([0, 1, 2, 255], (6, 7)).astype(np.uint8)
    expected = np.zeros((3, 4), dtype=np.int64)
    for label, prediction in zip(
        labels.ravel().tolist(), predictions.ravel().tolist(), strict=True
    ):
        if label != 255:
            expected[label, min(prediction, 3)] += 1
    counts = confusion_matrix(labels, predictions, 3)
    assert counts.dtype == np.int64
    assert (counts == expected).all()


@pytest.mark.parametrize("num_classes", [1, 19, 255])
def test_every_pair_of_values_is_counted_once(num_classes):
    labels, predictions = np.indices((256, 256), dtype=np.uint8)
    counts = confusion_matrix(labels, predictions, num_classes)
    assert counts.shape == (num_classes, num_classes + 1)
    assert (counts[:, :-1] == 1).all()
    assert (counts[:, -1] == 256 - num_classes).all()


def test_a_prediction_that_is_not_scored_is_still_a_miss():
    labels = np.array([[0, 0, 1, 1]], dtype=np.uint8)
    predictions = np.array([[0, 255, 1, 1]], dtype=np.uint8)
    assert class_ious(confusion_matrix(labels, predictions, 2), "union").tolist() == [0.5, 1.0]


def test_camvid_is_scored_in_its_own_classes(tmp_path):
    ids = np.array([[8, 8, 8, 10, 6, 11]], dtype=np.uint8)
    Image.fromarray(ids).save(tmp_path / "x.png")
    item = {
        "sem_seg_file_name": str(tmp_path / "x.png"),
        "label_map": "camvid",
        "image_id": "x",
    }
    predicted = [13, 14, 15, 12, 6, 0]  # car, truck, bus, rider, traffic light, road (ignored)
    scores = torch.nn.functional.one_hot(torch.tensor([predicted]), 19).permute(2, 0, 1).float()
    evaluator = DomainGeneralizationEvaluator("camvid_dusk_test")
    evaluator.process([item], [{"sem_seg": scores}])
    assert evaluator.evaluate()["sem_seg"] == {
        "mIoU": 100.0,
        "IoU-car": 100.0,
        "IoU-bicyclist": 100.0,
        "IoU-sign": 100.0,
    }
    assert len(LABEL_SPACES["camvid11"].classes) == 11


def test_nothing_to_score_is_an_error(scored):
    with pytest.raises(DatasetError, match="own_scored: no labelled pixel"):
        DomainGeneralizationEvaluator("own_scored").evaluate()


def test_other_ranks_go_on_where_the_first_finds_nothing_to_score(scored, monkeypatch):
    monkeypatch.setattr(comm, "is_main_process", lambda: False)
    assert DomainGeneralizationEvaluator("own_scored").evaluate() is None


@pytest.mark.parametrize("shape", [(19, 9, 11), (5, 11, 9)])
def test_scores_of_another_shape_are_an_error(scored, shape):
    evaluator = DomainGeneralizationEvaluator("own_scored")
    with pytest.raises(ValueError, match=r"scores have shape .* 5 classes and the size of"):
        evaluator.process(scored[0][:1], [{"sem_seg": torch.zeros(shape)}])


def test_an_unknown_rule_is_an_error_at_once(scored):
    with pytest.raises(ValueError, match="TEST.CLASS_RULE is 'all'"):
        DomainGeneralizationEvaluator("own_scored", class_rule="all")


def test_built_from_a_config(scored, tmp_path):
    cfg = default_config()
    cfg.TEST.CLASS_RULE, cfg.TEST.PICTURES = "union", 2
    evaluator = DomainGeneralizationEvaluator(cfg, "own_scored", output_dir=str(tmp_path))
    assert evaluator.class_rule == "union"


def test_pictures_are_spread_over_the_data_set(scored, tmp_path):
    evaluate(scored, output_dir=str(tmp_path / "out"), num_pictures=3)
    files = sorted((tmp_path / "out/pictures").iterdir())
    assert [f.name for f in files] == [f"own_scored_{k}.png" for k in range(3)]
    # The images are grey with their number; 0, 2 and 5 of 0 to 5 are drawn.
    assert [Image.open(f).getpixel((0, 0))[0] for f in files] == [0, 2, 5]


def test_images_of_one_id_are_told_apart_by_their_files(scored, tmp_path, monkeypatch):
    """Detectron2's own functions may give every entry the same image_id."""
    dicts, scores, labels = scored
    dicts = [{**item, "image_id": 0} for item in dicts]
    monkeypatch.setattr("fishertune_d2.evaluation.evaluator.load_datasets", lambda names: dicts)
    evaluate((dicts, scores, labels), output_dir=str(tmp_path / "out"), num_pictures=3)
    files = sorted((tmp_path / "out/pictures").iterdir())
    assert [Image.open(f).getpixel((0, 0))[0] for f in files] == [0, 2, 5]


def _rank(rank, address, dicts, scores, folder, results):
    torch.set_num_threads(1)  # OpenMP's threads are not there after a fork, and are waited for
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    register_sem_seg("own_scored", folder / "images", folder / "labels", CLASSES)
    evaluator = evaluate((dicts, scores, None), range(rank, 6, 2))
    result = evaluator.evaluate()
    results[rank] = None if result is None else dict(result["sem_seg"])
    torch.distributed.destroy_process_group()


def test_two_ranks_score_as_one(scored, tmp_path):
    expected = evaluate(scored).evaluate()["sem_seg"]
    context = mp.get_context("fork")
    results = context.Manager().dict()
    arguments = (f"file://{tmp_path}/rendezvous", scored[0], scored[1], tmp_path, results)
    processes = [context.Process(target=_rank, args=(r, *arguments)) for r in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=60)
        assert process.exitcode == 0
    assert results[0] == expected
    assert results[1] is None


def test_halved_labels_are_scored_and_drawn_at_their_size(scored, tmp_path):
    dicts, scores, labels = scored
    out = tmp_path / "out"
    evaluator = DomainGeneralizationEvaluator("own_scored", output_dir=str(out), num_pictures=1)
    confusion = 0
    for item, score, label in zip(dicts, scores, labels, strict=True):
        half, ids = score[:, 1::2, 1::2], label[1::2, 1::2]  # 9 x 11 becomes 4 x 5
        evaluator.process([{**item, "halve_label": True}], [{"sem_seg": half}])
        prediction = half.argmax(0).numpy().astype(np.uint8)
        confusion = confusion + confusion_matrix(ids.numpy().astype(np.uint8), prediction, 5)
    assert np.array_equal(evaluator.confusion, confusion)
    (picture,) = (out / "pictures").rglob("*.png")
    assert Image.open(picture).width == 3 * 5
