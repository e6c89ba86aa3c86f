"""Mask2Former's two decoders with text in them, as in tqdm (Pak et al., ECCV 2024).

Shapes:
    B: images in the batch; C: classes, as many as queries; E: channels of the text
    D: width of a decoder; N: cells of the maps at strides 8, 16 and 32 together; h, w: a map
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Mask2FormerConfig
from transformers.models.mask2former.modeling_mask2former import (
    Mask2FormerPixelDecoder,
    Mask2FormerPixelDecoderEncoderLayer,
    Mask2FormerTransformerModule,
)


class TextEncoderLayer(Mask2FormerPixelDecoderEncoderLayer):
    """A deformable layer in which the cells attend to the text, before the feed-forward network.

    Attributes:
        text: keys and values (B, C, D) of the next pass; transformers' encoder does not hand them
            on to its layers.
    """

    text: tuple[Tensor, Tensor] | None = None

    def __init__(self, config: Mask2FormerConfig):
        """Adds the attention to the text and its norm."""
        super().__init__(config)
        heads = config.num_attention_heads
        self.text_attn = nn.MultiheadAttention(self.embed_dim, heads, batch_first=True)
        self.text_attn_layer_norm = nn.LayerNorm(self.embed_dim)

    def forward(  # type: ignore[override]  # the encoder names all but the first two arguments
        self, hidden_states: Tensor, attention_mask: Tensor, **others: Any
    ) -> tuple[Tensor]:
        """Computes the layer.

        Args:
            hidden_states: (B, N, D).
            attention_mask: (B, N), where cells are padding; there are none.
            others: the positions (B, N, D) as ``position_embeddings``, and what the deformable
                attention needs.

        Returns:
            (B, N, D), in a tuple.

        Raises:
            RuntimeError: if there is no text.
        """
        if self.text is None:
            raise RuntimeError("TextEncoderLayer has no text: call it through TextPixelDecoder")
        keys, values = self.text
        attended, _ = self.self_attn(
            hidden_states=hidden_states,
            attention_mask=attention_mask,
            encoder_hidden_states=hidden_states,
            encoder_attention_mask=attention_mask,
            **others,
        )
        cells = self.self_attn_layer_norm(hidden_states + self._drop(attended))
        queries = cells + others["position_embeddings"]
        attended, _ = self.text_attn(queries, keys, values, need_weights=False)
        cells = self.text_attn_layer_norm(cells + attended)
        mixed = self.fc2(self._drop(self.activation_fn(self.fc1(cells))))
        return (self.final_layer_norm(cells + self._drop(mixed)),)

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)


class TextPixelDecoder(Mask2FormerPixelDecoder):
    """The pixel decoder, in each layer of which the cells attend to the text."""

    def __init__(self, config: Mask2FormerConfig, feature_channels: Sequence[int], dim: int):
        """Builds it for a text of ``dim`` = E channels."""
        super().__init__(config, list(feature_channels))
        self.encoder.layers = nn.ModuleList(
            TextEncoderLayer(config) for _ in range(config.encoder_layers)
        )
        self.text_projection = nn.Linear(dim, config.feature_size)
        self.text_positions = nn.Embedding(config.num_queries, config.feature_size)

    def forward(self, features: list[Tensor], text: Tensor) -> Any:  # type: ignore[override]
        """Computes the maps.

        Args:
            features: four maps (B, channels, h, w), from fine to coarse.
            text: (B, C, E).

        Returns:
            transformers' ``Mask2FormerPixelDecoderOutput``.
        """
        values = self.text_projection(text.to(features[0].dtype))
        keys = values + self.text_positions.weight
        try:
            self._hand_on((keys, values))
            return super().forward(features)
        finally:
            self._hand_on(None)

    def _hand_on(self, text: tuple[Tensor, Tensor] | None) -> None:
        for layer in self.encoder.layers:
            assert isinstance(layer, TextEncoderLayer)
            layer.text = text


class TextQueryTransformer(Mask2FormerTransformerModule):
    """The masked-attention decoder whose queries are made of the text."""

    def __init__(self, in_features: int, config: Mask2FormerConfig, dim: int):
        """Builds it for a text of ``dim`` = E channels, without learned query features."""
        super().__init__(in_features, config)
        del self.queries_features
        self.text_projection = nn.Sequential(
            nn.Linear(dim, config.hidden_dim),
            nn.ReLU(),
            nn.Linear(config.hidden_dim, config.hidden_dim),
        )

    def forward(  # type: ignore[override]
        self, multi_scale_features: Sequence[Tensor], mask_features: Tensor, text: Tensor
    ) -> Any:
        """Decodes the queries.

        Args:
            multi_scale_features: three maps (B, D, h, w), from coarse to fine.
            mask_features: (B, mask channels, h, w) at stride 4.
            text: (B, C, E).

        Returns:
            transformers' ``Mask2FormerMaskedAttentionDecoderOutput``.
        """
        queries = self.text_projection(text).transpose(0, 1)  # (C, B, D)
        embeddings = self.queries_embedder.weight[:, None].repeat(1, queries.shape[1], 1)
        positions, cells = [], []
        for i, features in enumerate(multi_scale_features):
            position = self.position_embedder(features.shape, features.device, features.dtype)
            positions.append(position.flatten(2).permute(2, 0, 1))
            projected = self.input_projections[i](features).flatten(2).permute(2, 0, 1)
            cells.append(projected + self.level_embed.weight[i])
        return self.decoder(
            inputs_embeds=queries,
            multi_stage_positional_embeddings=positions,
            pixel_embeddings=mask_features,
            encoder_hidden_states=cells,
            query_position_embeddings=embeddings,
            feature_size_list=[features.shape[-2:] for features in multi_scale_features],
            output_hidden_states=False,
            output_attentions=False,
            return_dict=True,
        )
