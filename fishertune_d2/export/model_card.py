"""The model card of an export: a README.md with the facts of the run, and its scores."""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tabulate import tabulate

from fishertune_d2.engine.evaluation_hook import BEST
from fishertune_d2.engine.run_record import RunRecord
from fishertune_d2.files import whole_file
from fishertune_d2.modeling import VFMS
from fishertune_d2.run import Results, Run, variant

from .delta import Architecture

logger = logging.getLogger(__name__)

# The first line of each card, by which a later export knows that it may replace the file.
_MARK = "<!-- A model card of fishertune_d2.export -->"
# How to load the weights, by layout. {name} is the file of a delta, {removals} a line for each part
# that the backbone is without.
_LOADING = {
    "delta": """from fishertune_d2.export import tuned_backbone

# The public weights are found as in a run, or in the file that weights="..." names.
backbone = tuned_backbone("{name}")""",
    "timm": """import timm

backbone = timm.create_model("local-dir:.", pretrained=True)  # in this folder""",
    # For a backbone without some parts of timm's model, whose weights timm would ask for.
    "timm without parts": """import json
from pathlib import Path

import timm
from safetensors.torch import load_file
from torch import nn

config = json.loads(Path("config.json").read_text())  # in this folder
backbone = timm.create_model(config["architecture"], num_classes=0, **config["model_args"])
{removals}
backbone.load_state_dict(load_file("model.safetensors"))""",
    "transformers": """from transformers import AutoModel

backbone = AutoModel.from_pretrained(".")  # in this folder""",
    "detectron2": """from fishertune_d2.config import read_config
from fishertune_d2.engine.trained_model import build_trained

# In this folder; a checkpoint without a record of its run has no config.yaml here: take the run's.
model = build_trained(read_config("config.yaml", ["MODEL.DEVICE", "cpu"]), "model.pth")""",
}


@dataclass(frozen=True)
class ModelCard:
    """The facts of the run that trained a model; empty if they are not known.

    Attributes:
        facts: texts by their names in the card.
        scores: of each test set the name, the domain ("source" or "unseen"), the mIoU in percent.
    """

    facts: Mapping[str, str] = field(default_factory=dict)
    scores: Sequence[tuple[str, str, float]] = ()

    @classmethod
    def of_run(cls, run: Run, checkpoint: Path, record: RunRecord | None) -> "ModelCard":
        """Collects the facts of a checkpoint from its record, and its scores from its folder.

        A damaged results.json raises a RunError.

        Args:
            run: the folder of the run.
            checkpoint: the checkpoint in it.
            record: the record in the checkpoint; None if there is none.

        Returns:
            The card. Its scores are those in results.json if that evaluation was of this
            checkpoint, else those that training logged at its iteration.
        """
        if record is None:
            return cls()
        config, results = record.config, run.results
        method = config.get("TUNING.METHOD")
        scored = results is not None and (results.protocol.get("iterations"), results.seed) == (
            record.iterations,
            config.get("SEED"),
        )
        images = "" if record.images is None else f" ({record.images:,} images)"
        facts: dict[str, Any] = {
            "tuning method": method and f"{method}{variant(config)}",
            "tuned weights of the backbone": _share(results) if scored else None,
            "training data": ", ".join(config.get("DATASETS.TRAIN", ())) + images,
            "iterations": record.iterations,
            "of these, warm-up of the decoder": config.get("TUNING.WARMUP_ITERS"),
            "batch size": config.get("SOLVER.IMS_PER_BATCH"),
            "decay of the average of the weights": config.get("SOLVER.EMA") or None,
            "seed": config.get("SEED"),
        }
        if checkpoint.stem == BEST and run.config_file.is_file():
            facts["chosen as the best by the mIoU on"] = run.config["TEST.BEST_ON"]
        if results is not None and scored:
            facts["protocol of the scores"] = _protocol(results)
            facts["commit of the scores"] = results.protocol.get("commit")
        return cls(
            {name: str(fact) for name, fact in facts.items() if fact not in (None, "")},
            _scores(run, results if scored else None, record.iterations),
        )

    def dumps(self) -> str:
        """The card for a note of a delta."""
        return json.dumps(asdict(self))

    @classmethod
    def loads(cls, note: str) -> "ModelCard":
        """Reads :meth:`dumps`; a damaged note raises a ValueError."""
        try:
            read = json.loads(note)
            facts = {str(name): str(fact) for name, fact in read["facts"].items()}
            return cls(facts, [(str(n), str(d), float(score)) for n, d, score in read["scores"]])
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(
                f"the delta's model card is damaged ({type(error).__name__}: {error}): fetch the "
                "delta again"
            ) from error

    def write(self, folder: Path, architecture: Architecture, layout: str, name: str = "") -> None:
        """Writes README.md, unless the folder has one that is no model card.

        Args:
            folder: the folder of the exported files.
            architecture: the backbone's.
            layout: "delta", or a name in ``LAYOUTS``.
            name: the file of a delta.
        """
        path = folder / "README.md"
        if path.is_file() and not path.read_text(errors="replace").startswith(_MARK):
            logger.warning("%s is no model card, so it stays and no card is written", path)
            return
        vfm = VFMS[architecture.vfm]
        facts = {
            "backbone": f"{architecture.vfm}, timm's `{architecture.timm_name}`",
            "public weights": vfm.source,
            "licence of the public weights": vfm.licence,
        }
        # A ConvNeXt has no size, whatever MODEL.VFM.IMG_SIZE says.
        if "img_size" in vfm.family.timm_args(architecture.img_size, architecture.patch_size):
            height, width = architecture.img_size
            facts["image size"] = f"{height} x {width} pixels (height x width)"
        facts |= {"patch size": f"{architecture.patch_size} pixels", **self.facts}
        method = self.facts.get("tuning method")
        parts = [
            _MARK,
            f"# {architecture.vfm}" + (f", tuned with {method}" if method else ", tuned"),
            tabulate(facts.items(), ["fact", "value"], "pipe", disable_numparse=True),
        ]
        if self.scores:
            columns = ["data set", "domain", "mIoU in percent"]
            parts += ["## Scores", tabulate(self.scores, columns, "pipe", floatfmt=".2f")]
        removals = "\n".join(f"backbone.{part} = nn.Identity()" for part in vfm.without)
        key = "timm without parts" if layout == "timm" and removals else layout
        code = _LOADING[key].format(name=name, removals=removals)
        parts += ["## How to load it", f"```python\n{code}\n```"]
        with whole_file(path) as temporary:
            temporary.write_text("\n\n".join(parts) + "\n")


def _share(results: Results | None) -> str | None:
    if results is None or results.tuned_parameters is None:
        return None
    tuned, whole = results.tuned_parameters, results.backbone_parameters
    return f"{tuned:,} of {whole:,} ({100 * tuned / whole:.2f} %)"


def _protocol(results: Results) -> str:
    facts = results.protocol
    names = ("name", "mode", "crop", "stride", "class_rule", "precision")
    return ", ".join(f"{n.replace('_', ' ')} {facts[n]}" for n in names if facts.get(n))


def _scores(
    run: Run, results: Results | None, iterations: int | None
) -> list[tuple[str, str, float]]:
    if results is not None:
        source = [(name, "source", score) for name, score in results.source.items()]
        return [*source, *((name, "unseen", score) for name, score in results.targets.items())]
    if not iterations:
        return []
    known = run.results.source if run.results else {}
    return [
        (name, "source" if name in known else "unseen", score)
        for name, series in run.score_series().items()
        for i, score in series
        if i == iterations
    ]
