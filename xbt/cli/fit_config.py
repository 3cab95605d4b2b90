"""The settings of ``xbt fit``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from xbt.data import CaptionSource, PairSource
from xbt.errors import ConfigError

AUTO, CLOSED_FORM = "auto", "procrustes"
_AUTO_ALONE = {
    "thorough": False,
    "use_old": True,
    "ks": [1, 5, 10],
    "confidence": 0.95,
    "every_k": False,
    "folds": 5,
}


@dataclass
class FitConfig:
    """Fit a projection from the new space to the old one, or choose one by held-out image-text pairs.

    Fitted to captions, which both encoders embed, or to two stores of the same items. With pairs, the
    candidates are judged on queries they have not seen, and where no gain is shown the old query stays.

    Writes ``projection/``, of a choice ``decision.json``, and, if the new encoder is named, ``compatible/``,
    the encoder that makes queries for the old gallery, to the output directory.
    """

    output_dir: str
    """Where everything goes."""
    old: str | None = None
    """The encoder that embedded the gallery; needed for captions and pairs."""
    new: str | None = None
    """The encoder that will query it; needed for captions and pairs."""
    captions: CaptionSource | None = None
    """The text corpus to fit to, or ..."""
    old_store: str | None = None
    """... a store of any items under the old encoder, and ..."""
    new_store: str | None = None
    """... one of the same items, in the same order, under the new encoder."""
    pairs: PairSource | None = None
    """Image-text pairs: to choose by (auto), or to learn from for the methods that can; their captions are
    taken out of the corpus."""
    method: str | None = None
    """auto, which chooses (the default with pairs); procrustes (the default without), ridge, low_rank,
    whitened_procrustes, lambda_orthogonal, mean_shift, identity, mlp or xbt."""
    options: dict[str, Any] = field(default_factory=dict)
    """The method's own options, such as --options.noise 0.3."""
    thorough: bool = False
    """auto: also try the trained projections, which takes minutes."""
    use_old: bool = True
    """auto: whether the old query tower may run at search time, beside the new one."""
    ks: list[int] = field(default_factory=lambda: [1, 5, 10])
    """auto: cut-offs that count, on average; [1] judges by R@1 alone."""
    confidence: float = 0.95
    """auto: one-sided confidence with which a direction must gain to be deployed."""
    every_k: bool = False
    """auto: whether every k must gain with that confidence, not their mean alone."""
    folds: int = 5
    """auto: folds of fitting and of judging."""
    seed: int = 0
    """Fixes folds and bootstrap, and the noise and order of the methods that train."""
    device: str | None = None
    """Where the encoders run; the GPU if there is one."""
    overwrite: bool = False
    """Replace the results of another run in the output directory."""

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            ConfigError: If there is nothing to fit to, or a setting lacks another one that it needs.
        """
        stores = [self.old_store, self.new_store]
        if any(stores) and not all(stores):
            missing = "--old_store" if self.old_store is None else "--new_store"
            raise ConfigError(f"{missing} is missing; two stores of the same items are needed")
        if any(stores) == (self.captions is not None):
            given = "both were" if any(stores) else "neither was"
            raise ConfigError(f"give either --captions.source or --old_store and --new_store: {given} given")
        for name in ("captions", "pairs"):
            if getattr(self, name) is not None and None in (self.old, self.new):
                raise ConfigError(
                    f"--{name}.source is embedded by both encoders; give --old and --new as well"
                )
        if self.chosen_method != AUTO:
            for name, usual in _AUTO_ALONE.items():
                if getattr(self, name) != usual:
                    raise ConfigError(
                        f"--{name} is for --method auto, not for {self.chosen_method}; leave it out"
                    )

    @property
    def chosen_method(self) -> str:
        """The method; where none is named, auto with pairs and else Procrustes."""
        return self.method or (CLOSED_FORM if self.pairs is None else AUTO)

    @property
    def selection(self) -> dict[str, Any]:
        """Options of auto, by name; see :class:`~xbt.projections.SelectionOptions`."""
        own = {name: getattr(self, name) for name in (*_AUTO_ALONE, "seed")}
        return {**own, "ks": tuple(self.ks), **self.options}
