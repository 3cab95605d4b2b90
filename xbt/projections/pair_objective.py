"""Retrieval by pairs as a loss: projected new queries against the old gallery, next to the loss on texts."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from xbt.losses import cosine_loss
from xbt.projections.objective import TextProjectionObjective
from xbt.projections.pairs import PairVectors

_LOGITS = 2**24
"""Upper bound on the scores of one direction in a step, 64 MiB of them."""


class JointObjective(nn.Module):
    """The loss on texts and the loss on image–text pairs, weighted.

        L       = (1 − ω) · L_text + ω · (L_T2I + L_I2T + L_image)
        L_T2I   = mean over texts t of   −log softmaxⱼ(⟨φ(t), gⱼ⟩ / τ) at t's image
        L_I2T   = mean over images i of  −log Σ_{j of i} softmaxⱼ(⟨φ(i), hⱼ⟩ / τ)
        L_image = mean over images i of  1 − cos(φ(i), gᵢ)

    with gⱼ the old image and hⱼ the old text vectors of *all* pairs: the queries are new, the galleries old
    and fixed. An image's texts are all right answers, so their probabilities are summed (MIL-NCE, Miech et
    al., CVPR 2020). Without new image vectors only L_T2I remains. The queries of a step are drawn at random.

    Args:
        text: The loss on texts, and with it φ.
        pairs: The pairs.
        weight: ω.
        temperature: τ.
        batch_size: Queries per direction and step, fewer where the gallery is large.
        seed: Fixes which.
    """

    old_images: Tensor
    old_texts: Tensor
    new_texts: Tensor
    owner: Tensor
    new_images: Tensor | None

    def __init__(
        self,
        text: TextProjectionObjective,
        pairs: PairVectors,
        weight: float,
        temperature: float,
        batch_size: int,
        seed: int,
    ) -> None:
        super().__init__()
        self.text, self.weight, self.logit_scale = text, weight, 1 / temperature
        for name, rows in (
            ("old_images", pairs.old_images),
            ("old_texts", pairs.old_texts),
            ("new_texts", pairs.new_texts),
            ("owner", pairs.image_of_text),
            ("new_images", pairs.new_images),
        ):
            self.register_buffer(name, rows, persistent=False)
        self.batch_size = batch_size
        self._generator = torch.Generator().manual_seed(seed)

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the loss and its parts for a batch of paired text vectors."""
        loss, parts = self.text(batch)
        if self.weight == 0:
            return loss, parts
        found = {"t2i": self._text_to_image()}
        if self.new_images is not None:
            found["i2t"], found["image"] = self._image_to_text(self.new_images)
        total = (1 - self.weight) * loss + self.weight * torch.stack(list(found.values())).sum()
        return total, {**parts, **{name: part.detach() for name, part in found.items()}}

    def _text_to_image(self) -> Tensor:
        chosen = self._draw(len(self.new_texts), len(self.old_images))
        queries = self.text.projection(self.new_texts[chosen], "text")
        return cross_entropy(self.logit_scale * queries @ self.old_images.T, self.owner[chosen])

    def _image_to_text(self, new_images: Tensor) -> tuple[Tensor, Tensor]:
        chosen = self._draw(len(new_images), len(self.old_texts))
        queries = self.text.projection(new_images[chosen], "image")
        scores = self.logit_scale * queries @ self.old_texts.T
        right = scores.masked_fill(self.owner != chosen[:, None], -torch.inf)
        loss = (scores.logsumexp(dim=1) - right.logsumexp(dim=1)).mean()
        return loss, cosine_loss(queries, self.old_images[chosen])

    def _draw(self, count: int, gallery: int) -> Tensor:
        size = max(1, min(self.batch_size, count, _LOGITS // gallery))
        return torch.randperm(count, generator=self._generator)[:size].to(self.owner.device)
