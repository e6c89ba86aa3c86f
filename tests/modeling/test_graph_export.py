"""The segmentor as a graph: torch.export, torch.jit.trace and ONNX."""

import pytest
import torch
from torch import nn

from .test_heads import FPN
from .test_segmentor import build
from .test_text_query_head import TEXT_HEAD

TINY = (
    "MODEL.BACKBONE.NAME", "VFMBackbone", "MODEL.VFM.NAME", "tiny", "MODEL.VFM.WEIGHTS", "random",
    "MODEL.VFM.IMG_SIZE", [48, 64], "MODEL.MASK_FORMER.DEC_LAYERS", 2, "TEST.CROP_SIZE", [48, 64],
    "TEST.STRIDE", [40, 40],
)  # fmt: skip
TEXT = (
    *(word for pair in TEXT_HEAD.items() for word in pair), "MODEL.TEXT.NAME", "tiny",
    "MODEL.TEXT.WEIGHTS", "random", "MODEL.TEXT.CLASSES", [f"class {k}" for k in range(4)],
)  # fmt: skip


class _Scores(nn.Module):
    """The segmentor on a tensor in place of a list of dicts."""

    def __init__(self, *changes):
        super().__init__()
        self.model = build(*TINY, *changes)
        self.eval()

    def forward(self, image):
        return self.model([{"image": image}])[0]["sem_seg"]


def _image(height, width):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (3, height, width), generator=generator).float()


def _exported(scores, image):
    return torch.export.export(scores, (image,)).module()


@pytest.mark.parametrize(
    ("graph_of", "changes"),
    [
        (_exported, ("TEST.MODE", "whole")),
        (_exported, (*FPN, "TEST.MODE", "slide")),
        (_exported, (*TEXT, "TEST.MODE", "whole")),
        (torch.jit.trace, ("TEST.MODE", "whole")),
    ],
)
@pytest.mark.filterwarnings("ignore")  # the tracer's, of sizes that become constants
def test_a_graph_computes_the_same(graph_of, changes):
    size = 50, 90  # which is padded, and the position embedding is resized
    scores = _Scores(*changes)
    graph = graph_of(scores, _image(*size))
    other = _image(*size).flip(-1)
    torch.testing.assert_close(graph(other), scores(other))


@pytest.mark.filterwarnings("ignore")  # the exporter's own
def test_the_tracing_onnx_exporter_is_told_what_to_do_at_another_size(tmp_path):
    scores, image = _Scores("TEST.MODE", "whole"), _image(70, 96)
    expected = scores(image)

    def export():
        file = str(tmp_path / "model.onnx")
        torch.onnx.export(scores, (image,), file, dynamo=False, opset_version=17)

    with pytest.raises(
        ValueError, match=r"for \[48, 64\] pixels, to \[80, 96\].* dynamo=True"
    ) as e:
        export()
    assert "vit.set_input_size(img_size=(80, 96))" in str(e.value)
    scores.model.backbone.vit.set_input_size(img_size=(80, 96))
    torch.testing.assert_close(scores(image), expected)
    export()
    assert (tmp_path / "model.onnx").stat().st_size > 1000
