"""Scores a model on every test set and writes one table."""

import json
import logging
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.evaluation import DatasetEvaluator, inference_on_dataset
from detectron2.utils import comm
from torch import nn

from fishertune_d2.data import DatasetError, SegmentationMapper
from fishertune_d2.data.protocols import Protocol
from fishertune_d2.evaluation import DomainGeneralizationEvaluator, format_table, summarize
from fishertune_d2.evaluation.label_pictures import find_pictures
from fishertune_d2.files import whole_file
from fishertune_d2.version import commit

from .loaders import scoring_loader
from .parameter_counts import count_parameters
from .precision import scoring_autocast, set_matmul_precision
from .run_record import RunRecord, run_of

logger = logging.getLogger(__name__)


class NotAllScored(DatasetError):
    """Some test sets could not be scored.

    Attributes:
        results: what :func:`score_datasets` would return, of the other test sets alone.
    """

    def __init__(self, trouble: str, results: OrderedDict):
        super().__init__(trouble)
        self.results = results


def score_datasets(
    cfg: CfgNode,
    model: nn.Module,
    *,
    build_loader: Callable[[CfgNode, str], Iterable] = scoring_loader,
    build_evaluator: Callable[[CfgNode, str], DatasetEvaluator] | None = None,
    evaluators: DatasetEvaluator | Sequence[DatasetEvaluator] | None = None,
) -> OrderedDict:
    """Scores ``model`` on DATASETS.TEST.

    Writes ``results.json`` (mIoU of the source and of each unseen domain, their average, IoU by
    class, counts of parameters, the protocol) and the pictures into OUTPUT_DIR. Facts about the
    training come from the run that trained the model (its attribute ``trained_by``), whatever
    ``cfg`` says; they are null if that run is unknown.

    If a test set cannot be scored, the others still are: the results name the reason, and the error
    follows at the end.

    Args:
        cfg: DATASETS, DATALOADER, SOLVER.AMP, TEST and OUTPUT_DIR are read.
        model: the segmentor, without DDP wrapper; :func:`require_trained` checks it.
        build_loader: builds the loader of a test set from the config and its name.
        build_evaluator: builds its evaluator; a ``DomainGeneralizationEvaluator`` by default.
        evaluators: one for each test set, in place of ``build_evaluator``.

    Returns:
        The result of each data set's evaluator, and ``"unseen": {"mIoU": average}``; empty on all
        ranks but the first.

    Raises:
        NotAllScored: if a test set could not be scored, after all others are; has their results.
    """
    require_trained(model)
    if comm.is_main_process():
        for name in cfg.DATASETS.TEST:
            for picture in find_pictures(cfg.OUTPUT_DIR, name):  # of an earlier evaluation
                picture.unlink()
    set_matmul_precision(cfg)
    results: OrderedDict = OrderedDict()
    failed: dict[str, str] = {}
    pairs = zip(cfg.DATASETS.TEST, _evaluators(cfg, build_evaluator, evaluators), strict=True)
    for name, evaluator in pairs:
        result, trouble = _score(cfg, model, partial(build_loader, cfg, name), evaluator)
        if trouble:
            failed[name] = trouble
            logger.error("%s is not scored: %s", name, trouble)
        else:
            results[name] = result
    if comm.is_main_process() and results:
        _write(cfg, model, results, failed)
    if not comm.is_main_process():
        results = OrderedDict()
    if failed:
        comm.synchronize()  # a process that leaves must not take the first one with it
        raise NotAllScored("\n\n".join(failed.values()), results)
    return results


def _score(
    cfg: CfgNode, model: nn.Module, load: Callable[[], Iterable], evaluator: DatasetEvaluator
) -> tuple[Any, str]:
    """Scores one test set; returns the evaluator's result, and the errors of all processes."""
    device, training = next(model.parameters()).device, model.training
    result, error = None, ""
    with scoring_autocast(cfg, device):
        try:
            inference_on_dataset(model, load(), _WithoutResult(evaluator))
        except DatasetError as stop:
            model.train(training)  # Detectron2 restores the mode only if nothing fails
            error = str(stop)
        # Before the evaluator gathers the counts of all processes. Otherwise they would wait for
        # the counts of a process that could not read an image.
        trouble = _errors_of_all(error)
        if not trouble:
            try:
                result = evaluator.evaluate() or {}
            except DatasetError as stop:  # of the first process, which has all counts
                error = str(stop)
            trouble = _errors_of_all(error)
    return result, trouble


def _errors_of_all(error: str) -> str:
    """The errors of all processes, each once and the same text in each; "" if none has one."""
    return "; ".join(dict.fromkeys(each for each in comm.all_gather(error) if each))


class _WithoutResult(DatasetEvaluator):
    """Passes images on to an evaluator, and leaves its ``evaluate`` to the caller."""

    def __init__(self, evaluator: DatasetEvaluator):
        self.evaluator = evaluator

    def reset(self) -> None:
        self.evaluator.reset()

    def process(self, inputs: list, outputs: list) -> None:
        self.evaluator.process(inputs, outputs)


def metrics_by_name(results: Mapping[str, Any] | None) -> dict[str, Any]:
    """Brings results into the form of TEST.EXPECTED_RESULTS: metrics by data set and "unseen"."""
    return {
        name: result.get("sem_seg", result) if isinstance(result, Mapping) else result
        for name, result in (results or {}).items()
    }


def require_trained(model: nn.Module) -> None:
    """Refuses a model that no load has filled, or that has no place for a loaded tensor."""
    remedy = (
        "fill it by `fishertune_d2.engine.trained_model.build_trained(cfg, weights)` or "
        "--eval-only, which attach the tuning of the run and load all of its checkpoint"
    )
    untrained = sorted(getattr(model, "untrained", ()))
    if untrained:
        raise ValueError(
            f"the model has tensors that are as they were initialised ({len(untrained)}, the first "
            f"is {untrained[0]}), so its scores would be those of random weights: {remedy}, or "
            "train it first"
        )
    unplaced = sorted(getattr(model, "unplaced", ()))
    if unplaced:
        raise ValueError(
            f"the model has no place for tensors that were loaded into it ({len(unplaced)}, the "
            f"first is {unplaced[0]}), as when it lacks the TUNING.METHOD that they belong to, so "
            f"its scores would not be those of the trained model: {remedy}"
        )


def _evaluators(
    cfg: CfgNode,
    build: Callable[[CfgNode, str], DatasetEvaluator] | None,
    evaluators: DatasetEvaluator | Sequence[DatasetEvaluator] | None,
) -> list[DatasetEvaluator]:
    names = cfg.DATASETS.TEST
    if isinstance(evaluators, DatasetEvaluator):
        evaluators = [evaluators]
    if evaluators is None:
        build = build or partial(DomainGeneralizationEvaluator, output_dir=cfg.OUTPUT_DIR)
        return [build(cfg, name) for name in names]
    if len(evaluators) != len(names):
        raise ValueError(
            f"{len(evaluators)} evaluators are given for {len(names)} test sets "
            f"({', '.join(names)}): give one for each"
        )
    return list(evaluators)


def _write(cfg: CfgNode, model: nn.Module, results: OrderedDict, failed: Mapping[str, str]) -> None:
    """Writes results.json and the table of the results that hold an mIoU; adds the average."""
    ours = {name: r for name, r in results.items() if "mIoU" in (r or {}).get("sem_seg", {})}
    if len(ours) < len(results):
        others = ", ".join(name for name in results if name not in ours)
        logger.info("No table of %s, whose evaluators return no sem_seg mIoU", others)
    if not ours:
        return
    record = run_of(model)
    trained = record.applied_to(cfg) if record else cfg
    mapper = SegmentationMapper(cfg, is_train=False)
    summary = summarize(ours, trained.DATASETS.TRAIN, _protocol(cfg, record), mapper)
    # Counted on an empty model: the trained one may also hold vectors of selected weights.
    counts = count_parameters(trained, iterations=record.iterations if record else None)
    summary |= counts if record else counts | {"tuned_parameters": None}
    if failed:
        summary["failed"] = dict(failed)
    path = Path(cfg.OUTPUT_DIR) / "results.json"
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(summary, indent=2) + "\n")
    under = f" under the protocol {cfg.TEST.PROTOCOL}" if cfg.TEST.PROTOCOL else ""
    logger.info("Results in percent%s, also in %s:\n%s", under, path, format_table(summary))
    if cfg.TEST.PICTURES:
        logger.info("Pictures of image, label and prediction: %s", path.parent / "pictures")
    # An average over fewer data sets than at other times would not compare with theirs.
    if summary["target_average"] is not None and not failed:
        results["unseen"] = {"mIoU": summary["target_average"]}


def score_rules(cfg: CfgNode) -> dict[str, Any]:
    """Returns how a config scores, as the protocol in ``results.json`` records it.

    Args:
        cfg: TEST and SOLVER's precision are read.

    Returns:
        ``name`` if the protocol has one, ``mode``, ``class_rule``, ``precision`` if it is not
        float32, and ``crop`` and ``stride`` of sliding windows.
    """
    protocol = Protocol.from_config(cfg)
    rules: dict[str, Any] = {"name": protocol.name} if protocol.name else {}
    rules |= {"mode": cfg.TEST.MODE, "class_rule": protocol.class_rule}
    if cfg.SOLVER.AMP.ENABLED:
        rules["precision"] = cfg.SOLVER.AMP.PRECISION
    elif cfg.SOLVER.MATMUL_PRECISION != "highest":
        rules["precision"] = f"float32, {cfg.SOLVER.MATMUL_PRECISION} matrix products"
    if cfg.TEST.MODE == "slide":
        rules |= {"crop": list(cfg.TEST.CROP_SIZE), "stride": list(cfg.TEST.STRIDE)}
    return rules


def _protocol(cfg: CfgNode, record: RunRecord | None) -> dict:
    trained: Mapping[str, Any] = record.config if record else {}
    names = trained.get("DATASETS.TRAIN", cfg.DATASETS.TRAIN)
    iterations = record.iterations if record else None
    return {
        **score_rules(cfg),
        "vfm": cfg.MODEL.VFM.NAME,
        "train": list(names),
        "method": trained.get("TUNING.METHOD"),
        "feature_perturbation": trained.get("TUNING.FEATURE_PERTURBATION"),
        "ema": trained.get("SOLVER.EMA"),
        "seed": trained.get("SEED"),
        "iterations": iterations or trained.get("SOLVER.MAX_ITER"),
        "warmup_iterations": trained.get("TUNING.WARMUP_ITERS"),
        "batch_size": trained.get("SOLVER.IMS_PER_BATCH"),
        "commit": commit(),
    }
