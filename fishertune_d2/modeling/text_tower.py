"""The text towers of CLIP models, which turn class names into embeddings; open_clip builds them.

Shapes: N texts, L tokens of a text, W width of the tokens, E channels of the embeddings.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from detectron2.data import MetadataCatalog
from huggingface_hub import HfApi, try_to_load_from_cache
from torch import Tensor

from fishertune_d2.compat import require_versions
from fishertune_d2.files import first_names

from .frozen import Frozen
from .public_weights import require_numbers
from .weight_files import StateDict, read_weights

KEY = "MODEL.TEXT.WEIGHTS"
# The first parts of a text tower's names where a CLIP model keeps them beside those of its image
# tower; other CLIP models have them all below "text.".
_TOP_LEVEL = (
    "positional_embedding",
    "text_projection",
    "token_embedding.",
    "transformer.",
    "ln_final.",
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TextModel:
    """One CLIP model, of which the text tower is used.

    Attributes:
        open_clip_name: open_clip's name of the model; empty for a model with ``sizes``.
        tag: open_clip's name of its public weights; empty if there are none.
        licence: the licence of the public weights.
        source: the page or file where its authors publish them.
        sizes: the arguments of open_clip's TextTransformer, for a model that open_clip lacks.
    """

    open_clip_name: str
    tag: str
    licence: str
    source: str
    sizes: Mapping[str, Any] = field(default_factory=dict)


HUGGING_FACE = "https://huggingface.co"
TEXT_TOWERS: dict[str, TextModel] = {
    # A tower has the name of the VFM that is the image tower of the same CLIP model. The files of
    # EVA-CLIP's authors hold both.
    "eva02_clip_vitl": TextModel(
        "EVA02-L-14",
        tag="merged2b_s4b_b131k",
        licence="MIT",
        source=f"{HUGGING_FACE}/QuanSun/EVA-CLIP/resolve/main/EVA02_CLIP_L_psz14_s4B.pt",
    ),
    "eva02_clip_vitl_336": TextModel(
        "EVA02-L-14-336",
        tag="merged2b_s6b_b61k",
        licence="MIT",
        source=f"{HUGGING_FACE}/QuanSun/EVA-CLIP/resolve/main/EVA02_CLIP_L_336_psz14_s6B.pt",
    ),
    "convnext_clip_large": TextModel(
        "convnext_large_d_320",
        tag="laion2b_s29b_b131k_ft_soup",
        licence="MIT",
        source=f"{HUGGING_FACE}/laion/CLIP-convnext_large_d_320.laion2B-s29B-b131K-ft-soup",
    ),
    # Two small layers without public weights, for tests and for trying a configuration.
    "tiny": TextModel(
        "",
        tag="",
        licence="",
        source="",
        sizes={"width": 32, "heads": 2, "layers": 2, "output_dim": 64},
    ),
}


class TextTower(Frozen):
    """The frozen text tower of a CLIP model.

    Attributes:
        text: open_clip's module, without the image tower.
        width: W.
        dim: E.
        context_length: the largest L.
    """

    def __init__(self, name: str, weights: str = ""):
        """Builds the tower and loads its weights, all of them or none.

        A missing file raises a FileNotFoundError, weights that cannot be downloaded a RuntimeError,
        and a missing open_clip an ImportError.

        Args:
            name: a key of ``TEXT_TOWERS``.
            weights: a file with the tower alone or with the whole CLIP model, of open_clip or of
                the authors, see ``read_weights``; "" for the public weights from Hugging Face's
                hub; or "random", which keeps the initial values.

        Raises:
            ValueError: if ``name`` is no text tower, or the file does not fit.
        """
        super().__init__()
        if name not in TEXT_TOWERS:
            raise ValueError(f"MODEL.TEXT.NAME is {name!r}; known are {', '.join(TEXT_TOWERS)}")
        open_clip = _import_open_clip()
        model = TEXT_TOWERS[name]
        sizes = dict(model.sizes)
        if model.open_clip_name:
            config = open_clip.get_model_config(model.open_clip_name)
            sizes = {"output_dim": config["embed_dim"], **config["text_cfg"]}
        self.text = open_clip.transformer.TextTransformer(**sizes)
        self.width, self.dim = self.text.width, self.text.output_dim
        self.context_length = self.text.context_length
        self._tokenizer = open_clip.SimpleTokenizer(context_length=self.context_length)
        self._load(name, weights)
        self.requires_grad_(False).eval()

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """Returns the tokens of texts: start, words, end, and zeros.

        Returns:
            (N, L) int64 on the CPU, where L is ``context_length``.

        Raises:
            ValueError: if a text is too long.
        """
        for text in texts:
            if len(self._tokenizer.encode(text)) > self.context_length - 2:
                raise ValueError(
                    f"the text {text!r} has more than {self.context_length - 2} tokens: shorten it"
                )
        # A model that is only counted is built on the meta device, which would lose the numbers.
        with torch.device("cpu"):
            return self._tokenizer(list(texts))

    def ends(self, tokens: Tensor) -> Tensor:
        """Returns the place of each text's end in tokens (N, L); (N,) int64."""
        return tokens.argmax(-1)  # the end has the largest number in the vocabulary

    def embed(self, tokens: Tensor) -> Tensor:
        """Returns the embeddings (N, L, W) of tokens (N, L), without positions."""
        return self.text.token_embedding(tokens)

    def encode(self, embedded: Tensor, ends: Tensor) -> Tensor:
        """Encodes embedded tokens, some of which may be learned.

        Args:
            embedded: (N, L, W), without positions; L may be less than ``context_length``.
            ends: (N,) int64, the place of each text's end. A token sees only those before it, so
                those behind the end have no influence.

        Returns:
            (N, E), not normalised.
        """
        length = embedded.shape[1]
        x = embedded + self.text.positional_embedding[:length]
        x = self.text.transformer(x, attn_mask=self.text.attn_mask[:length, :length])
        x = self.text.ln_final(x)
        return x[torch.arange(len(x), device=x.device), ends] @ self.text.text_projection

    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """Returns the embeddings (N, E) of texts, not normalised."""
        tokens = self.tokenize(texts).to(self.text.positional_embedding.device)
        return self.encode(self.embed(tokens), self.ends(tokens))

    def _load(self, name: str, weights: str) -> None:
        """Loads all weights, and logs how many there are."""
        if weights == "random":
            if not self.text.positional_embedding.is_meta:  # a model on meta is only counted
                logger.warning(
                    f'the text tower {name} keeps its random initialisation ({KEY} "random")'
                )
            return
        place = weights or _download(name)
        remedy = (
            f"Set {KEY} to a file with this text tower (as its authors or open_clip publish it: "
            f'{TEXT_TOWERS[name].source or "there is none"}), or to "random" for untrained weights.'
        )
        title = f"text tower {name} from {place}"
        try:
            state = read_weights(place, KEY)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{error}. {remedy}") from error
        state, ignored = _pick_text(state)
        wanted = self.text.state_dict()
        fitting = {k for k, v in wanted.items() if k in state and state[k].shape == v.shape}
        if not fitting == set(wanted) == set(state):
            raise ValueError(
                f"weights do not fit: {title} has {len(fitting)} of {len(wanted)} tensors. Missing "
                f"or of wrong shape: {first_names([k for k in wanted if k not in fitting], 8)}. "
                f"Unexpected: {first_names([k for k in state if k not in wanted], 8)}. {remedy}"
            )
        self.text.load_state_dict(require_numbers(state, title, remedy))
        logger.info(f"{title}: loaded {len(wanted)}; missing 0; unexpected 0; ignored {ignored}")


def class_names(classes: Sequence[str], dataset: str, count: int) -> list[str]:
    """Returns the names of the classes for a text tower, with spaces between words.

    Args:
        classes: MODEL.TEXT.CLASSES; empty for the names in the metadata of ``dataset``.
        dataset: a registered data set, whose ``stuff_classes`` are the names; "" for none.
        count: MODEL.SEM_SEG_HEAD.NUM_CLASSES.

    Raises:
        ValueError: if the names are unknown, or there are more or fewer than ``count``.
    """
    names = list(classes)
    origin = "MODEL.TEXT.CLASSES"
    if dataset and not names:
        names = list(MetadataCatalog.get(dataset).get("stuff_classes", ()))
        origin = f"the metadata of {dataset} (stuff_classes)"
    if len(names) != count:
        raise ValueError(
            f"{origin} has {len(names)} names, and MODEL.SEM_SEG_HEAD.NUM_CLASSES is {count}: set "
            "MODEL.TEXT.CLASSES to the names of the classes, in the order of their ids"
        )
    return [name.replace("_", " ") for name in names]


def _import_open_clip() -> ModuleType:
    try:
        import open_clip
    except ModuleNotFoundError as error:
        if error.name != "open_clip":
            raise
        raise ImportError(
            "MODEL.TEXT needs open_clip: pip install 'fishertune-d2[text]'"
        ) from error
    require_versions("open_clip_torch")
    return open_clip


def _pick_text(state: StateDict) -> tuple[StateDict, int]:
    """Picks a text tower out of a file; returns it, and how many other tensors the file has."""
    state = {name.removeprefix("module."): value for name, value in state.items()}
    prefix = "text." if any(name.startswith("text.") for name in state) else ""
    text = {
        name.removeprefix(prefix): value
        for name, value in state.items()
        if name.startswith(prefix or _TOP_LEVEL)
    }
    return text, len(state) - len(text)


def _download(name: str) -> str:
    """Returns the file with the public weights, from Hugging Face's cache or its hub."""
    model = TEXT_TOWERS[name]
    if not model.tag:
        raise ValueError(
            f'the text tower {name} has no public weights: set {KEY} to a file, or to "random"'
        )
    open_clip = _import_open_clip()
    config = open_clip.get_pretrained_cfg(model.open_clip_name, model.tag)
    repo = config["hf_hub"].strip("/")
    cached = try_to_load_from_cache(repo, "open_clip_model.safetensors")
    if isinstance(cached, str):
        return cached
    try:
        # A quick request first, because without a network the download retries for a minute.
        HfApi().model_info(repo, timeout=10)
        return open_clip.download_pretrained(config)
    # The errors of a network depend on the client and its version.
    except Exception as error:
        raise RuntimeError(
            f"no weights for the text tower {name}: {type(error).__name__}: {error}. Download "
            f"{model.source} and set {KEY} to the file, which may hold the whole CLIP model, or "
            f'set {KEY} to "random" for untrained weights.'
        ) from error
