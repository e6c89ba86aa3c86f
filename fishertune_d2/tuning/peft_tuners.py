"""LoRA, and any other tuner of peft that works inside a model's linear layers.

peft wraps each layer that it tunes, so that the frozen weight of ``q_proj`` has the name
``q_proj.base_layer.weight`` in a checkpoint of the tuning stage. Fused layers are split first, see
:mod:`fishertune_d2.tuning.split_qkv`. Only these methods import peft.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import fields
from types import ModuleType
from typing import Any

import torch
from detectron2.config import CfgNode
from torch import nn

from fishertune_d2.compat import require_versions

from .registry import TUNING_REGISTRY, TuningMethod
from .split_qkv import PROJECTIONS, join_qkv, split_qkv

# Tuners with a name of their own that are an option of another tuner in peft.
_OPTIONS_OF = {"DORA": ("LORA", {"use_dora": True})}
# Tuners that read values of tensors when they are built; tensors on the meta device have none.
_READ_VALUES = ("BOFT", "FROD", "SHIRA", "UNILORA")
# The backbone's attribute with the names of the parameters that a tuner has added.
_TUNED_NAMES = "tuned_names"


class PeftTuner(TuningMethod):
    """Trains the parameters that a tuner of peft adds to the layers with certain names.

    If peft is missing or too old, an ImportError says how to install it.

    Args:
        tuner: peft's name of the tuner, or ``"DORA"``, in upper or lower case.
        targets: names of the layers: ``"q_proj"``, ``"k_proj"`` and ``"v_proj"`` in every family,
            or a timm name such as ``"fc2"``.
        options: options of peft's config of that tuner.

    Raises:
        ValueError: if there is no such tuner or option, or the tuner cannot work here.
    """

    options: tuple[str, ...] | None = ("LORA", "PEFT")
    adds = True
    # Factors: of a layer's outputs or inputs in IA3, of a weight's columns in DoRA.
    undecayed = ("ia3_l", "lora_magnitude_vector")

    def __init__(self, tuner: str, targets: Sequence[str], options: Mapping[str, Any]):
        name, implied = _OPTIONS_OF.get(tuner.upper(), (tuner.upper(), {}))
        options = {**implied, **options}
        tuners = _usable_tuners()
        if name not in tuners:
            raise ValueError(
                f"TUNING.PEFT.TYPE is {tuner!r}: choose from {', '.join([*tuners, *_OPTIONS_OF])}. "
                "peft's others need language, or calls between the steps of training"
            )
        self.name, self.targets = name, list(targets)
        self._tuner, config = tuners[name]
        known = sorted(field.name for field in fields(config) if field.init)
        unknown = [option for option in options if option not in known]
        if unknown:
            raise ValueError(
                f"TUNING.PEFT.OPTIONS names {', '.join(unknown)}: {name} has {', '.join(known)}"
            )
        if "feedforward_modules" in known:  # the layers of which IA3 scales inputs, not outputs
            feedforward = [each for each in targets if each.startswith("fc")]
            options.setdefault("feedforward_modules", feedforward)
        self._config, self._options = config, options

    def attach(self, backbone: nn.Module, head: nn.Module | None = None) -> None:
        """Wraps the layers of :meth:`find_targets` in the tuner's."""
        vit = backbone.get_submodule("vit")
        targets = self.find_targets(vit)
        vit.requires_grad_(False)
        needs_values = self.name in _READ_VALUES and next(vit.parameters()).is_meta
        try:
            options = dict(self._options)
            if "feedforward_modules" in options:  # peft wants them among the targets
                ends = options["feedforward_modules"]
                options["feedforward_modules"] = [n for n in targets if _last_part(n) in ends]
            config = self._config(**options, target_modules=targets)
            with _values(vit, targets) if needs_values else nullcontext():
                self._tuner(vit, config, "default")
        except (NotImplementedError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(
                f"peft cannot put {self.name} around {', '.join(self.targets)}: {error}"
            ) from error
        # peft marks trained parameters by these flags, which other stages overwrite.
        tuned = [name for name, p in backbone.named_parameters() if p.requires_grad]
        setattr(backbone, _TUNED_NAMES, tuned)

    def find_targets(self, vit: nn.Module) -> list[str]:
        """Finds the linear layers to tune, and splits fused layers if a target needs it.

        Args:
            vit: the ViT, without the tuner's layers.

        Returns:
            The layers' names in ``vit``. Their ends alone would not do: "proj" is the end of the
            patch embedding's convolution, too.

        Raises:
            ValueError: if the ViT lacks a target.
        """
        if not set(self.targets).isdisjoint(PROJECTIONS):
            split_qkv(vit)
        linear = [name for name, module in vit.named_modules() if isinstance(module, nn.Linear)]
        ends = {_last_part(name) for name in linear}
        missing = [target for target in self.targets if target not in ends]
        if missing:
            raise ValueError(
                f"TUNING.PEFT.TARGETS names {', '.join(missing)}: this backbone has "
                f"{', '.join(sorted(ends))}"
            )
        return [name for name in linear if _last_part(name) in self.targets]

    def parameters(self, backbone: nn.Module) -> dict[str, nn.Parameter]:
        """The parameters that the tuner added and trains."""
        return {name: backbone.get_parameter(name) for name in getattr(backbone, _TUNED_NAMES)}

    def merge(self, backbone: nn.Module) -> None:
        """Writes each layer's change into its weight, if it has one, and joins the split layers."""
        from peft.tuners.tuners_utils import BaseTunerLayer

        vit = backbone.get_submodule("vit")
        layers = {n: m for n, m in vit.named_modules() if isinstance(m, BaseTunerLayer)}
        for name, layer in layers.items():
            try:
                layer.merge()
            except NotImplementedError as error:
                raise ValueError(
                    f"what {self.name} adds cannot be written into the layers' own weights "
                    f"({error}): keep the run's checkpoint"
                ) from error
            vit.set_submodule(name, layer.get_base_layer())
        delattr(vit, "peft_config")
        delattr(backbone, _TUNED_NAMES)
        join_qkv(vit)


def _last_part(name: str) -> str:
    return name.rpartition(".")[2]


@contextmanager
def _values(vit: nn.Module, targets: Sequence[str]) -> Iterator[None]:
    """Gives the targets of a model on the meta device random weights on the CPU for a while."""
    for name, module in list(vit.named_modules()):
        if name in targets:
            for parameter in module.to_empty(device="cpu").parameters():
                parameter.data.normal_()  # decompositions need full rank
    with torch.device("cpu"):
        yield
    vit.to("meta")


def _usable_tuners() -> dict[str, tuple[type, type]]:
    """The tuners of peft that work inside layers alone, by name, each with its config's class."""
    mapping = _import_peft().mapping
    base = _import_peft().tuners.tuners_utils.BaseTuner
    return {
        kind.value: (tuner, mapping.PEFT_TYPE_TO_CONFIG_MAPPING[kind])
        for kind, tuner in sorted(mapping.PEFT_TYPE_TO_TUNER_MAPPING.items())
        if issubclass(tuner, base)
        and tuner.forward is base.forward
        # AdaLoRA and similar tuners move their budget after each step.
        and not hasattr(tuner, "update_and_allocate")
        and kind.value != "TRAINABLE_TOKENS"  # for embeddings of words
    }


def _import_peft() -> ModuleType:
    require_versions("peft")
    try:
        import peft
    except ModuleNotFoundError as error:
        if error.name != "peft":  # peft is installed, but one of its own dependencies is missing
            raise
        raise ImportError(
            "TUNING.METHOD lora, soma and peft need peft: pip install 'fishertune-d2[baselines]'"
        ) from None
    return peft


@TUNING_REGISTRY.register()
def lora(cfg: CfgNode) -> TuningMethod:
    """``TUNING.METHOD lora``, on queries and values as its authors (arXiv:2106.09685)."""
    options = {"r": cfg.TUNING.LORA.RANK, "lora_alpha": cfg.TUNING.LORA.ALPHA}
    return PeftTuner("LORA", ["q_proj", "v_proj"], options)


@TUNING_REGISTRY.register()
def peft(cfg: CfgNode) -> TuningMethod:
    """``TUNING.METHOD peft``, with ``cfg.TUNING.PEFT``."""
    options = cfg.TUNING.PEFT.OPTIONS
    if len(options) % 2:
        raise ValueError(f"TUNING.PEFT.OPTIONS is {options}: give names and values in turn")
    pairs = dict(zip(options[::2], options[1::2], strict=True))
    return PeftTuner(cfg.TUNING.PEFT.TYPE, cfg.TUNING.PEFT.TARGETS, pairs)
