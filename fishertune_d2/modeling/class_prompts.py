"""Prompts for class names, partly learned, before a frozen text tower (CoOp, Zhou et al., 2022).

Shapes: C classes, L tokens of a prompt, P learned tokens, W width of tokens, E channels.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .text_tower import TextTower

# tqdm's fixed prompt, with which it compares what it has learned.
ANCHOR = "a clean origami of a {}"


class ClassPrompts(nn.Module):
    """Embeds class names behind learned tokens, which all classes share."""

    tokens: Tensor
    anchor_tokens: Tensor

    def __init__(self, tower: TextTower, classes: Sequence[str], context_tokens: int):
        """Tokenises the names.

        Args:
            tower: stays frozen.
            classes: the C names.
            context_tokens: P.

        Raises:
            ValueError: if a prompt has more tokens than the tower accepts.
        """
        super().__init__()
        self.tower = tower
        device = tower.text.positional_embedding.device
        for buffer, texts in (
            ("tokens", list(classes)),
            ("anchor_tokens", [ANCHOR.format(name) for name in classes]),
        ):
            tokens = tower.tokenize(texts)
            tokens = tokens[:, : int(tower.ends(tokens).max()) + 1]
            self.register_buffer(buffer, tokens.to(device), persistent=False)
        length = self.tokens.shape[1] + context_tokens
        if length > tower.context_length:
            raise ValueError(
                f"MODEL.TEXT.CONTEXT_TOKENS {context_tokens} makes prompts of {length} tokens, and "
                f"the text tower reads {tower.context_length}: lower it, or shorten class names"
            )
        self.context = nn.Parameter(torch.empty(context_tokens, tower.width))
        nn.init.trunc_normal_(self.context)

    def forward(self) -> Tensor:
        """Returns the embeddings (C, E) of the prompts: start, learned tokens, name, end."""
        embedded = self.tower.embed(self.tokens)
        context = self.context.expand(len(embedded), -1, -1)
        prompts = torch.cat([embedded[:, :1], context, embedded[:, 1:]], dim=1)
        return self.tower.encode(prompts, self.tower.ends(self.tokens) + len(self.context))

    @torch.no_grad()
    def anchors(self) -> Tensor:
        """Returns the embeddings (C, E) of the fixed prompt."""
        embedded = self.tower.embed(self.anchor_tokens)
        return self.tower.encode(embedded, self.tower.ends(self.anchor_tokens))
