#!/usr/bin/env python
"""Writes docs/rivals.md: each method's paper, licence, recipe, counted weights, and scores.

python tools/rivals.py
"""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import fishertune_d2  # noqa: E402, F401 - registers everything; it need not be installed
from fishertune_d2.analysis.statistics import (  # noqa: E402
    format_mean,
    format_weights,
    markdown_table,
)
from fishertune_d2.analysis.study import read_table  # noqa: E402
from fishertune_d2.bench.result_table import AVERAGE, paper_numbers  # noqa: E402
from fishertune_d2.config import get_config_file, read_config  # noqa: E402
from fishertune_d2.engine.parameter_counts import count_parameters  # noqa: E402
from fishertune_d2.run import Results  # noqa: E402

REIN_RECIPE = "Rein's: 40 k, 4 images, 1e-4"


@dataclass(frozen=True)
class Rival:
    """A method of the literature, as this project has it.

    Attributes:
        name: the name in the page.
        paper: where it was published; "" for none.
        licence: the licence of the authors' code; "-" where no file or page names one.
        trains: the weights that train in the backbone, or are added to it.
        recipe: iterations, images of a step, and learning rate.
        config: the config, below configs/.
        method: TUNING.METHOD, and the entry of the bench.
    """

    name: str
    paper: str
    licence: str
    trains: str
    recipe: str
    config: str
    method: str

    @property
    def is_on_dinov2(self) -> bool:
        """Whether the config is for DINOv2, the model of the tables with scores."""
        return "dinov2" in self.config

    @property
    def command(self) -> str:
        """The config, or the bench's entry if the config is another method's."""
        own = read_config(get_config_file(self.config)).TUNING.METHOD == self.method
        return f"`configs/{self.config}`" if own else f"`bench table1 --methods {self.method}`"

    def count(self) -> int:
        """Counts the weights that train in the backbone or are added to it."""
        options = ["TUNING.METHOD", self.method]
        return count_parameters(read_config(get_config_file(self.config), options))[
            "tuned_parameters"
        ]


DINOV2 = "fishertune_dinov2.yaml"
RIVALS = (
    Rival("Frozen backbone", "", "-", "nothing", REIN_RECIPE, "freeze_dinov2.yaml", "freeze"),
    Rival(
        "Full fine-tuning",
        "",
        "-",
        "all weights",
        f"{REIN_RECIPE} x 0.1",
        "full_dinov2.yaml",
        "full",
    ),
    Rival(
        "LoRA",
        "ICLR 2022",
        "MIT",
        "factors beside q and v",
        REIN_RECIPE,
        "lora_dinov2.yaml",
        "lora",
    ),
    Rival(
        "VPT (deep)",
        "ECCV 2022",
        "CC BY-NC 4.0",
        "prompts in each block",
        REIN_RECIPE,
        DINOV2,
        "vpt",
    ),
    Rival(
        "AdaptFormer",
        "NeurIPS 2022",
        "MIT",
        "a bottleneck beside each MLP",
        REIN_RECIPE,
        DINOV2,
        "adaptformer",
    ),
    Rival(
        "VQT",
        "CVPR 2023",
        "BSD-3-Clause",
        "queries in each block, and a projection",
        REIN_RECIPE,
        DINOV2,
        "vqt",
    ),
    Rival(
        "ChildTuning-D",
        "EMNLP 2021",
        "-",
        "5 % of the weights, by F",
        "as FisherTune",
        DINOV2,
        "childtune",
    ),
    Rival(
        "Rein",
        "CVPR 2024",
        "GPL-3.0",
        "tokens behind each block",
        REIN_RECIPE,
        "rein_dinov2.yaml",
        "rein",
    ),
    Rival(
        "SET (SDT)", "ACM MM 2024", "-", "tokens on spectra of patches", REIN_RECIPE, DINOV2, "set"
    ),
    Rival(
        "SoMA",
        "CVPR 2025",
        "MIT",
        "the 16 minor singular components of each layer from a third of the depth on, and biases",
        "40 k, 4 images, 1e-4 x 0.5; decay falls by a cosine; average of weights from 12 k",
        "soma_dinov2.yaml",
        "soma",
    ),
    Rival(
        "VLTSeg",
        "ACCV 2024",
        "-",
        "all weights of EVA-02-CLIP-L",
        "5 k, 16 images, 1e-4 x 0.1",
        "vltseg_eva02_clip.yaml",
        "full",
    ),
    Rival(
        "tqdm",
        "ECCV 2024",
        "MIT",
        "all weights of EVA-02-CLIP-L; the head has queries made of class names",
        "20 k, 8 images (the authors: 8 a GPU, number of GPUs unknown), 1e-5 x 0.1; rare classes "
        "and crops are drawn",
        "tqdm_eva02_clip.yaml",
        "full",
    ),
    Rival(
        "CLOUDS, stage 1",
        "CVPR 2024",
        "Apache-2.0",
        "nothing of CLIP's ConvNeXt-L; the head classifies masks by class names",
        "40 k, 8 images, 1e-5",
        "clouds_convnext.yaml",
        "freeze",
    ),
    Rival(
        "CLOUDS, stage 2",
        "CVPR 2024",
        "Apache-2.0",
        "as stage 1, from its weights; the teacher is an average of the head",
        "40 k, 8 images, 1e-5; two images without labels for each labelled one",
        "clouds_convnext_self_training.yaml",
        "freeze",
    ),
    Rival(
        "**FisherTune**",
        "CVPR 2025",
        "-",
        "5 % of the weights, by DRF, in a growing share",
        "40 k, 4 images, 1e-4 (the paper gives no rate); the first 5 k train the head alone",
        DINOV2,
        "fishertune",
    ),
    Rival(
        "**FisherTune with text queries**",
        "",
        "-",
        "5 % of EVA-02-CLIP-L by DRF, with tqdm's head",
        "20 k, 8 images, 1e-5; the first 2.5 k train the head alone",
        "fishertune_text_eva02_clip.yaml",
        "fishertune",
    ),
)


@dataclass(frozen=True)
class Published:
    """mIoU that a paper reports for a model trained on GTAV."""

    name: str
    model: str
    scores: tuple[float | None, float | None, float | None]  # Cityscapes, BDD100K, Mapillary
    mean: float
    source: str


# The sizes into which Cityscapes, BDD100K and Mapillary are fitted, the protocol of that name, and
# the numbers. Those of the paper's Table 1 are in paper.csv.
AT_1024 = "Tested at 1024 x 512, 1280 x 720 and 1024 x 512 (`TEST.PROTOCOL rein`)"
AT_2048 = "Tested at 2048 x 1024, 1280 x 720 and 2048 x 1024 (`TEST.PROTOCOL tqdm`)"
AT_SHORT_1024 = "Images and labels resized to a short side of 1024 (no protocol here)"
NO_SCORES = (None, None, None)
OWN_NUMBERS: Mapping[str, Sequence[Published]] = {
    AT_2048: (
        Published("Rein", "DINOv2-L", NO_SCORES, 66.1, "Rein's later test at this size"),
        Published("tqdm", "EVA-02-CLIP-L", (68.9, 59.2, 70.1), 66.1, "tqdm, ECCV 2024"),
        Published("SoMA", "DINOv2-L", (71.8, 61.3, 71.7), 68.27, "SoMA, CVPR 2025"),
    ),
    AT_SHORT_1024: (
        Published("CLOUDS", "CLIP ConvNeXt-L", (60.2, 57.4, 67.0), 61.5, "CLOUDS, CVPR 2024"),
    ),
}
SETS = ("cityscapes_val", "bdd100k_val", "mapillary_val")
# The studies with measured scores: their file, and their heading with the page that explains them.
MEASURED = {
    "table1_camvid": "Trained on [CamVid by day](results/tables.md#which-method-is-best-at-dusk)",
    "table1_streets": "Trained on [scenes](results/tables.md#do-the-built-in-scenes-agree)",
}
MEASURED_SETS = ("camvid_day_test", "camvid_dusk_test")
HEADS_SETS = ("camvid_day_val", "camvid_dusk_dev")

HEAD = """# The rivals

This page compares FisherTune with other ways to adapt a foundation model to domain-generalized
segmentation. It says how each one trains here, the numbers that papers report, and the scores that
were measured here. **The two kinds of numbers do not compare**: papers train large models on GTAV;
the runs here train DINOv2 ViT-S on small data. Numbers of papers compare only within one table
below, because the size of the test images alone lifts Rein from 64.3 to 66.1.

This command counts the weights, reads the scores, and writes this page:

```sh
python tools/rivals.py
```

## What trains, and by which recipe

*Weights* are those that train in the backbone or are added to it, counted in the model that the
config builds: DINOv2 ViT-L, if *trains* names no other. Mask2Former's head trains with all of them.
A recipe has iterations, images of a step, and learning rate; *x* is the backbone's factor.
*Licence* is that of the authors' code; none of their code is used here. A dash means that no
licence was found, or that there is no such paper or code.
"""
PUBLISHED_HEAD = """## What papers report

mIoU in percent after training on GTAV. Each table has one test size. FisherTune's Table 1 states
304.2 M trained weights for CLOUDS; the code of CLOUDS trains the head alone.
"""
MEASURED_HEAD = """## What was measured here

mIoU in percent on test sets, mean and sample standard deviation over seeds 43, 44 and 45 (seed 43
alone if there is no deviation). The protocol is `native` and the backbone DINOv2 ViT-S. The warm-up
has 300 iterations and the tuning 300. Rein and SET train without a warm-up, so their tuning has
600. Each method has the learning rate that its search on the dev sets chose.
"""
# The runs of heads that know the classes by name, by their config below configs/camvid/.
HEADS = {
    "text_queries": "tqdm's, with FisherTune on a small backbone of random weights",
    "mask_text": "CLOUDS's, on the frozen DINOv2 ViT-S",
}
HEADS_HEAD = """## The heads with text

The public towers of CLIP were not at hand for these runs, so a small text tower of random weights
stands in. **The scores show only that the heads train**, not how good tqdm and CLOUDS are. The
training has 100 + 100 iterations on CamVid by day with seed 43, and no learning rate was searched:

```sh
# needs CamVid; 5 to 10 minutes each on two cores
python train_net.py --config-file configs/camvid/text_queries.yaml
python train_net.py --config-file configs/camvid/mask_text.yaml
cp outputs/camvid/text_queries/results.json docs/results/heads/text_queries.json
cp outputs/camvid/mask_text/results.json docs/results/heads/mask_text.json
```
"""
TAIL = """## Methods without an entry here

The means are those that the papers report for GTAV to Cityscapes, BDD100K and Mapillary. The test
sizes are not known here, so these means compare neither with each other nor with the tables above.

| method | mean | reason |
|---|---|---|
| RecycleLoRA (CVPR 2026 Findings) | 68.95 | its code has no licence |
| FADA (NeurIPS 2024) | 66.1 | its code has no licence |
| MFuser (CVPR 2025) | 68.20 | it needs two foundation models and Mamba's compiled operators |
| Vireo (NeurIPS 2025) | 67.7 | it needs a third model, for depth |
"""


def methods_table() -> str:
    """Returns the table of methods, with their counted weights."""
    lines = [
        [
            r.name,
            r.paper or "-",
            r.licence,
            r.trains,
            format_weights([r.count()]),
            r.recipe,
            r.command,
        ]
        for r in RIVALS
    ]
    headers = ["method", "paper", "licence", "trains", "weights", "recipe", "config or command"]
    return markdown_table(lines, headers)


def published_tables() -> Iterator[str]:
    """Yields a heading and a table for each test size."""
    numbers = paper_numbers("table1")
    rows = [
        Published(
            r.name,
            "DINOv2-L",
            tuple(numbers["dinov2_vitl", r.method, name] for name in SETS),  # type: ignore[arg-type]
            numbers["dinov2_vitl", r.method, AVERAGE],
            "FisherTune, Table 1",
        )
        for r in RIVALS
        if r.is_on_dinov2 and ("dinov2_vitl", r.method, AVERAGE) in numbers
    ]
    for size, published in {AT_1024: rows, **OWN_NUMBERS}.items():
        lines = [
            [p.name, p.model, *("-" if s is None else s for s in p.scores), p.mean, p.source]
            for p in published
        ]
        headers = ["method", "model", "Cityscapes", "BDD100K", "Mapillary", "mean", "source"]
        yield f"### {size}\n\n{markdown_table(lines, headers)}"


def measured_tables() -> Iterator[str]:
    """Yields a heading and a table for each study in ``MEASURED``."""
    for study, title in MEASURED.items():
        scores: dict[str, list[Mapping[str, float]]] = {}
        table = ROOT / f"docs/results/{study}.jsonl"
        for run in read_table(table):
            if run.tested:
                scores.setdefault(run.entry, []).append(run.results(table).scores)
        lines = [
            [r.name, *(format_mean([s[name] for s in scores[r.method]]) for name in MEASURED_SETS)]
            for r in RIVALS
            if r.is_on_dinov2 and r.method in scores
        ]
        yield f"### {title}\n\n{markdown_table(lines, ['method', *MEASURED_SETS])}"


def heads_table() -> str:
    """Returns the table of the heads that know the classes by name."""
    lines = []
    for name, words in HEADS.items():
        file = ROOT / f"docs/results/heads/{name}.json"
        results = Results.of(json.loads(file.read_text()), str(file))
        scores = (f"{results.scores[each]:.2f}" for each in HEADS_SETS)
        lines.append([words, *scores, results.commit])
    return markdown_table(lines, ["head", *HEADS_SETS, "commit"])


def page() -> str:
    """Returns the text of docs/rivals.md."""
    parts = [
        HEAD,
        methods_table(),
        PUBLISHED_HEAD,
        *published_tables(),
        MEASURED_HEAD,
        *measured_tables(),
        HEADS_HEAD,
        heads_table(),
        TAIL,
    ]
    return "\n\n".join(part.strip() for part in parts) + "\n"


if __name__ == "__main__":
    (ROOT / "docs/rivals.md").write_text(page())
    print(ROOT / "docs/rivals.md")
