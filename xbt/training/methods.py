"""Methods of training a backbone: heads, losses, required models, weights of the papers, and settings."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Literal

from xbt.backbones import ImagePreprocessing
from xbt.data import LabelledSource
from xbt.errors import ConfigError
from xbt.heads import (
    BCTHead,
    BCTLoss,
    BT2Head,
    BT2Loss,
    ClassificationLoss,
    CompatibleHead,
    HeadLoss,
    OCAHead,
    OCALoss,
    PlainHead,
    Prototypes,
)
from xbt.heads.losses import check_smoothing
from xbt.training.args import BackboneTraining

Method = Literal["independent", "bct", "bt2", "oca"]
_LOSSES: dict[str, Callable[..., HeadLoss]] = {
    "independent": ClassificationLoss, "bct": BCTLoss, "bt2": BT2Loss, "oca": OCALoss,
}  # fmt: skip
_EXTRA_DIMS = {"independent": 0, "bct": 0, "bt2": 32, "oca": 32}


@dataclass
class LossWeights:
    """Weights of the parts of a method's loss; the defaults are those of the method's authors.

    BCT has ``classification`` (1) and ``influence`` (10); BT² ``classification`` (1), ``new`` (λ1 = 1; 5 is
    better on little data), ``influence`` (λ2 = 10) and ``old`` (λ3 = 5); OCA ``classification`` (5),
    ``influence`` (10) and ``prototype`` (5); an independent model has no weights.
    """

    classification: float | None = None
    """Cross entropy of the classifier."""
    influence: float | None = None
    """Cross entropy of the inner products with the old model's class prototypes."""
    new: float | None = None
    """Cosine to the independent new model's vector of the image."""
    old: float | None = None
    """Cosine to the old model's vector of the image."""
    prototype: float | None = None
    """Cosine to the old model's prototype of the image's class."""

    def of(self, method: Method) -> dict[str, float]:
        """Weights of a method by their names in the loss, such as ``influence_weight``.

        Raises:
            ConfigError: If a weight is negative, is not part of the method, or all are 0.
        """
        known = {
            name.removesuffix("_weight"): parameter.default
            for name, parameter in inspect.signature(_LOSSES[method]).parameters.items()
            if name.endswith("_weight")
        }
        for name, value in asdict(self).items():
            if value is None:
                continue
            if name not in known:
                has = f"it has {', '.join(known)}" if known else "it has none"
                raise ConfigError(
                    f"--weights.{name} is no part of the loss of {method} ({has}); leave it out"
                )
            if not 0 <= value < float("inf"):
                raise ConfigError(f"--weights.{name} must be a number of at least 0, got {value}")
            known[name] = value
        if known and not any(known.values()):
            raise ConfigError(f"the weights of {method} ({', '.join(known)}) are all 0; raise one")
        return {f"{name}_weight": value for name, value in known.items()}


@dataclass
class CompatibleBackboneConfig:
    """Train an image backbone on labelled images: independent of others, or compatible with an old one.

    Writes ``model/`` (load it with ``xbt.CompatibleBackbone.from_pretrained``), ``result.json`` and, if there
    are test images, ``report.md`` to the output directory. The vectors of the other models are
    cached in ``vectors/``.
    """

    method: Method
    """independent, bct, bt2 or oca."""
    backbone: str
    """The architecture: timm:NAME, torchvision:NAME, small_resnet, or clip: and an encoder."""
    data: LabelledSource
    """The training images."""
    output_dir: str
    """Output directory of the run."""
    test: LabelledSource | None = None
    """Images for the retrieval test, with classes that the old model never saw."""
    old: str | None = None
    """The trained backbone to be compatible with: the model/ of its run, or a Hub repository."""
    independent: str | None = None
    """The independent new model, trained on the same data: teacher of bt2, and baseline of gain and tax."""
    pretrained: bool = False
    """Start from the architecture's published weights instead of random ones."""
    new_dim: int = 128
    """Dimension of the new model's own features; oca has none but the old and the extra ones."""
    extra_dims: int | None = None
    """Dimensions added to the larger of new_dim and the old model's (bt2), to the old model's (oca) or to
    new_dim (bct); by default 32, 32 and 0."""
    scale: float = 2.0
    """Scale C of BT²: weight of the new model's features in new vectors."""
    orthogonal: bool = True
    """Give oca its orthogonal layer before the classifier."""
    orthogonal_map: Literal["matrix_exp", "cayley", "householder"] = "matrix_exp"
    """Parametrisation of the orthogonal matrices of bt2 and oca: matrix_exp is that of the authors, cayley is
    many times faster on a CPU."""
    weights: LossWeights = field(default_factory=LossWeights)
    """Weights of the parts of the loss; by default those of the method's authors."""
    label_smoothing: float = 0.1
    """Label smoothing of independent, bct and oca; bt2 has none."""
    preprocessing: ImagePreprocessing = field(default_factory=ImagePreprocessing)
    """Preprocessing and augmentation of images."""
    training: BackboneTraining = field(default_factory=lambda: BackboneTraining(epochs=100, warmup_epochs=5))
    """Settings of the training; nothing is held out, so eval_every has no effect."""
    sync_batchnorm: bool = True
    """Synchronise batch norm over GPUs; on CPUs each process uses the statistics of its share."""
    embed_batch_size: int = 128
    """Images per forward pass of the old and the independent model."""
    overwrite: bool = False
    """Replace another run in the output directory."""

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ConfigError: If one cannot be used, or the method lacks a model or is given one too many.
        """
        if not self.output_dir.strip():
            raise ConfigError("--output_dir is missing; name a directory")
        for name, minimum in (("new_dim", 1), ("extra_dims", 0), ("embed_batch_size", 1)):
            value = getattr(self, name)
            if value is not None and value < minimum:
                raise ConfigError(f"--{name} must be at least {minimum}, got {value}")
        check_smoothing(self.label_smoothing)
        weights = self.weights.of(self.method)
        if self.method == "independent":
            self._refuse_models()
        else:
            self._require_models(weights)

    def _refuse_models(self) -> None:
        for name in ("old", "independent"):
            if (value := getattr(self, name)) is not None:
                raise ConfigError(
                    f"--{name} {value} was given, but an independent model is trained without other models; "
                    "leave it out, or choose --method bct, bt2 or oca"
                )

    def _require_models(self, weights: dict[str, float]) -> None:
        learns = self.method == "bt2" and bool(weights["new_weight"])
        if self.old is None:
            raise ConfigError(
                f"--method {self.method} needs --old, the directory or Hub repository of the trained "
                "backbone that it is to be compatible with; train one with --method independent"
            )
        if learns and self.independent is None:
            raise ConfigError(
                "--method bt2 needs --independent, a backbone trained on the same data with --method "
                "independent, which it learns from; or set --weights.new 0"
            )
        if self.independent is not None and not learns and self.test is None:
            raise ConfigError(
                f"--independent {self.independent} is needed by {self.method} only to measure gain and tax, "
                "and there is no --test to measure them on; give one or leave it out"
            )

    def make_head(self, n_classes: int, old_dim: int) -> CompatibleHead:
        """Build the method's head with a classifier and random weights.

        The whole vectors have ``new_dim`` dimensions (independent), ``new_dim + extra_dims`` (BCT),
        ``max(new_dim, old_dim) + extra_dims`` (BT²) or ``old_dim + extra_dims`` (OCA). In a series of updates
        old_dim grows with every version, because each is compatible with the whole vectors of the one before
        it; BT² then adds ``extra_dims`` to those.

        Args:
            n_classes: Classes of the training data.
            old_dim: Dimension of the old model's whole vectors; 0 for none.

        Raises:
            ConfigError: If the numbers do not fit together.
        """
        new_dim, given = self.new_dim, self.extra_dims
        extra = _EXTRA_DIMS[self.method] if given is None else given
        if self.method == "independent":
            if extra:
                raise ConfigError(
                    f"--extra_dims {extra} was given, but an independent model has none; raise --new_dim "
                    "instead"
                )
            return PlainHead(new_dim, n_classes)
        if self.method == "bct":
            return BCTHead(new_dim, old_dim, extra, n_classes)
        if self.method == "oca":
            return OCAHead(old_dim, extra, self.orthogonal, n_classes, self.orthogonal_map)
        if extra > min(new_dim, old_dim):
            raise ConfigError(
                f"--extra_dims {extra} is more than BT² can use; take at most the smaller of --new_dim "
                f"{new_dim} and the old model's {old_dim} dimensions"
            )
        beyond = extra + max(0, old_dim - new_dim)
        return BT2Head(new_dim, old_dim, beyond, self.scale, n_classes, self.orthogonal_map)

    def make_loss(self, prototypes: Prototypes | None) -> HeadLoss:
        """Build the method's loss; ``prototypes`` are the old model's, where there is one."""
        options = {} if self.method == "bt2" else {"label_smoothing": self.label_smoothing}
        of_old = [] if prototypes is None else [prototypes]
        return _LOSSES[self.method](*of_old, **self.weights.of(self.method), **options)
