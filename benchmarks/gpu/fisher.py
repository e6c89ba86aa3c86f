"""Measures the Fisher information on one GPU: batched, in a loop, ranked, and against the CPU."""

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fishertune_d2.engine import Trainer
from fishertune_d2.engine.image_losses import SegmentationLoss
from fishertune_d2.engine.precision import set_matmul_precision
from fishertune_d2.fisher import (
    ESTIMATORS,
    FisherEstimate,
    Selection,
    count_of_share,
    domain_related_fisher,
    estimate_fisher,
    find_candidates,
    overlap,
)
from fishertune_d2.tuning.set import compose, decompose
from gpu.measure import (
    CLASSES,
    GIB,
    PRECISIONS,
    check,
    configure,
    now,
    peak_gib,
    release,
    reset_peak,
)

SHARE = 0.05
LEAST_OVERLAP = 0.99  # of two selections that should be the same
MOST_DIFFERENCE = 1e-3  # ||a - b|| / ||b|| of two estimates in float32
# The candidates of ViT-L, and the parameters of its backbone, to which shares refer.
CANDIDATES, BASE = 277_020_672, 304_198_656
# The memory that ranking may need in addition to F(x) and F(x'), as a multiple of that of F(x).
MOST_HELD = 4.0
REPEATS = 3  # the first one warms up
# These estimators draw noise, which differs between devices.
RANDOM = ("natural", "variational")


def fisher(args: argparse.Namespace, root: Path, save: Callable[..., None]) -> None:
    """Estimates F(x) of one batch, batched (``diagonal``) and by image (``diagonal_loop``)."""
    cuda, entries, checks = args.device != "cpu", [], []
    cfg = configure(args, root)
    with torch.device(args.device):
        model = Trainer.build_model(cfg).train()
    candidates = find_candidates(model.backbone)
    batch = noise_batch(cfg.INPUT.CROP.SIZE, cfg.FISHER.IMS_PER_BATCH)
    for precision in args.precisions:
        keys = PRECISIONS[precision]
        set_matmul_precision(configure(args, root, keys))
        autocast = torch.bfloat16 if keys["SOLVER.AMP.ENABLED"] else None
        estimates: dict[str, FisherEstimate] = {}
        for estimator in ("diagonal", "diagonal_loop"):
            seconds = []
            for _ in range(REPEATS):
                estimates.pop(estimator, None)  # that of the repeat before is no part of the peak
                release()
                reset_peak(cuda)
                start = now(cuda)
                estimates[estimator] = estimate_fisher(
                    model,
                    [batch],
                    SegmentationLoss(),
                    candidates,
                    estimator=estimator,
                    progress=False,
                    autocast=autocast,
                )
                seconds.append(now(cuda) - start)
            entry = {"estimator": estimator, "precision": precision}
            entries.append({**entry, "seconds": median(seconds[1:]), "peak_gib": peak_gib(cuda)})
            estimates[estimator] = estimates[estimator].to("cpu")  # nor is it of the next ones
        batched, loop = (each.f for each in estimates.values())
        some = list(loop)[::8]  # to rank all tensors would take as long as the estimates
        agreeing = selected_overlap(*({n: f[n] for n in some} for f in (batched, loop)))
        entries[-1] |= {"difference": relative_difference(batched, loop), "overlap": agreeing}
        if precision == "float32":
            words = f"diagonal selects as diagonal_loop: overlap at least {LEAST_OVERLAP}"
            checks.append(check(agreeing >= LEAST_OVERLAP, words, f"{agreeing:.4f}"))
        save({"fisher": entries}, checks)
        print(*entries[-2:], sep="\n", flush=True)


def noise_batch(size: tuple[int, int], images: int) -> list[dict]:
    """Makes images of noise whose labels are bands.

    Args:
        size: height and width.
        images: the number of images.

    Returns:
        Inputs of a segmentor, one for each image.
    """
    height, width = size
    bands = (torch.arange(height) * CLASSES // height)[:, None].expand(height, width)
    generator = torch.Generator().manual_seed(0)
    return [
        {"image": torch.randint(0, 256, (3, height, width), generator=generator), "sem_seg": bands}
        for _ in range(images)
    ]


def ranking(args: argparse.Namespace, root: Path, save: Callable[..., None]) -> None:
    """Ranks as many weights as ViT-L has candidates, by DRF of two forms."""
    cuda, entries, checks = args.device != "cpu", [], []
    count = CANDIDATES // (1000 if args.tiny else 1)
    base = BASE // (1000 if args.tiny else 1)
    generator = torch.Generator(args.device).manual_seed(0)

    def draw() -> dict[str, Tensor]:
        return {
            str(k): torch.rand(count // 24, generator=generator, device=args.device).pow_(8)
            for k in range(24)
        }

    estimate = FisherEstimate(draw(), draw(), 0.3, images=1)
    held = 4 * count / GIB
    for form in ("balanced", "rank"):
        release()
        reset_peak(cuda)
        start = now(cuda)
        scores = domain_related_fisher(estimate, form=form)
        scored = now(cuda)
        selection = Selection.from_scores(scores, SHARE, base)
        end = now(cuda)
        chosen = sum(len(places) for places in selection.indices.values())
        entry = {"form": form, "scores": count, "selected": chosen}
        entry |= {"scoring_seconds": scored - start, "selecting_seconds": end - scored}
        entry["peak_gib"] = peak_gib(cuda)
        entries.append(entry)
        words = f"form {form} selects {SHARE:.0%} of the backbone"
        checks.append(check(chosen == count_of_share(SHARE, base), words, f"{chosen:,}"))
        if cuda:
            beside = entry["peak_gib"] / held - 2
            words = f"form {form} adds at most {MOST_HELD:g} times the memory of F(x)"
            checks.append(check(beside <= MOST_HELD, words, f"{beside:.1f} times"))
        save({"ranking": entries}, checks)
        print(entry, flush=True)
        scores = selection = None


def agreement(args: argparse.Namespace, root: Path, save: Callable[..., None]) -> None:
    """Compares estimates, selections and SET's spectra of the device with those of the CPU."""
    entries, checks = [], []
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    for estimator in ESTIMATORS:
        if estimator in RANDOM:
            continue
        on_device, on_cpu = (small_estimate(estimator, device) for device in (args.device, "cpu"))
        difference = relative_difference(on_device, on_cpu)
        agreeing = selected_overlap(on_device, on_cpu)
        entries.append({"what": estimator, "difference": difference, "overlap": agreeing})
        words = f"{estimator} as on the CPU: difference at most {MOST_DIFFERENCE:g}"
        checks.append(check(difference <= MOST_DIFFERENCE, words, f"{difference:.1e}"))
        words = f"{estimator} selects as on the CPU: overlap at least {LEAST_OVERLAP}"
        checks.append(check(agreeing >= LEAST_OVERLAP, words, f"{agreeing:.4f}"))
        save({"agreement": entries}, checks)
    x = torch.randn(4, 64, 384, generator=torch.Generator().manual_seed(0))
    there, here = (compose(*decompose(x.to(device))).cpu() for device in (args.device, "cpu"))
    difference = relative_difference({"": there}, {"": here})
    entries.append({"what": "SET's spectra", "difference": difference})
    words = f"SET's spectra as on the CPU: difference at most {MOST_DIFFERENCE:g}"
    checks.append(check(difference <= MOST_DIFFERENCE, words, f"{difference:.1e}"))
    save({"agreement": entries}, checks)
    print(*entries, sep="\n", flush=True)


def small_estimate(estimator: str, device: str) -> dict[str, Tensor]:
    """Estimates F(x) of a small classifier that draws no random numbers on the device.

    Args:
        estimator: a key of ESTIMATORS.
        device: the device of the model and the images.

    Returns:
        F by parameter name, on the CPU.
    """
    torch.manual_seed(0)
    model = timm.models.VisionTransformer(
        img_size=64, patch_size=8, num_classes=CLASSES, embed_dim=96, depth=4, num_heads=4
    ).to(device)
    images = [(torch.randn(3, 64, 64), k % CLASSES) for k in range(16)]

    def loss(model: nn.Module, batch: list) -> Tensor:
        pixels = torch.stack([image for image, _ in batch]).to(device)
        labels = torch.tensor([label for _, label in batch], device=device)
        return F.cross_entropy(model(pixels), labels, reduction="none")

    batches = [images[:8], images[8:]]
    candidates = find_candidates(model)
    return estimate_fisher(
        model, batches, loss, candidates, estimator=estimator, progress=False
    ).to("cpu").f  # fmt: skip


def relative_difference(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    """Computes ||a - b|| / ||b|| over all tensors together."""
    squares = [((a[name] - b[name]).double() ** 2).sum() for name in b]
    whole = [(b[name].double() ** 2).sum() for name in b]
    return float((sum(squares) / sum(whole)).sqrt())


def selected_overlap(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    """Computes the share of the best candidates by ``a`` that are among the best by ``b``."""
    count = sum(int((score > 0).sum()) for score in a.values())
    return overlap(*(Selection.from_scores(scores, SHARE, count) for scores in (a, b)))
