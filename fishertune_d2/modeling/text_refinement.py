"""Refines the embeddings of class names by an image, as tqdm does (Pak et al., ECCV 2024).

Shapes: B images, C classes, M tokens of an image, E channels of CLIP's embeddings, D width.
"""

from torch import Tensor, nn


class TextRefinement(nn.Module):
    """A pre-norm decoder: the classes attend to each other, then to the image."""

    def __init__(
        self, dim: int, width: int, *, heads: int = 4, layers: int = 3, dropout: float = 0.1
    ):
        """Builds the decoder; the defaults are tqdm's.

        Args:
            dim: E.
            width: D, a multiple of ``heads``.
            heads: heads of each attention.
            layers: how many layers there are.
            dropout: the share of values that training drops behind each attention and linear layer.
        """
        super().__init__()
        self.text_input = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, width))
        self.image_input = nn.Sequential(
            nn.LayerNorm(dim), nn.Linear(dim, width), nn.LayerNorm(width)
        )
        self.layers = nn.ModuleList(
            nn.TransformerDecoderLayer(
                width, heads, 4 * width, dropout, "gelu", batch_first=True, norm_first=True
            )
            for _ in range(layers)
        )
        self.output = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, dim))
        for module in self.modules():
            if isinstance(module, nn.MultiheadAttention):
                # tqdm's queries, keys and values have no bias, and its attention drops no weight.
                module.register_parameter("in_proj_bias", None)
                module.dropout = 0.0
                nn.init.trunc_normal_(module.in_proj_weight, std=0.02)
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, text: Tensor, image: Tensor) -> Tensor:
        """Returns the change of the text (B, C, E), before its factor gamma.

        Args:
            text: (B, C, E).
            image: (B, M, E).
        """
        text, image = self.text_input(text), self.image_input(image)
        for layer in self.layers:
            text = layer(text, image)
        return self.output(text)
