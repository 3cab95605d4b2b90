"""The settings of a run that trains a backbone."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from xbt.backbones import ImagePreprocessing
from xbt.data import LabelledSource
from xbt.errors import ConfigError
from xbt.training.args import BackboneTraining
from xbt.training.compatible_methods import LossWeights, Method, check_method


@dataclass
class CompatibleBackboneConfig:
    """Train an image backbone on labelled images: independent of others, or compatible with an old one.

    Writes ``model/`` (load it with ``xbt.CompatibleBackbone.from_pretrained``), ``result.json`` and, if there
    are test images, ``report.md`` to the output directory. The vectors of other models that it learns from
    are kept in ``vectors/``.
    """

    method: Method
    """independent, bct, bt2 or oca."""
    backbone: str
    """The architecture: timm:NAME, torchvision:NAME, small_resnet, or clip: and an encoder."""
    data: LabelledSource
    """The training images."""
    output_dir: str
    """Where everything goes."""
    test: LabelledSource | None = None
    """Images to measure retrieval on; classes that the old model never saw belong to them."""
    old: str | None = None
    """The trained backbone to be compatible with: the model/ of its run, or a Hub repository."""
    independent: str | None = None
    """The independent new model, trained on the same data: what bt2 learns from, and what gain and tax are
    measured against."""
    pretrained: bool = False
    """Start from the architecture's published weights instead of random ones."""
    new_dim: int = 128
    """Dimension of the new model's own features; oca has none but the old and the extra ones."""
    extra_dims: int | None = None
    """Dimensions added to the larger of new_dim and the old model's (bt2), to the old model's (oca) or to
    new_dim (bct); by default 32, 32 and 0."""
    scale: float = 2.0
    """BT²'s scale C: how much the new model's features count among new vectors."""
    orthogonal: bool = True
    """Whether oca has its orthogonal layer before the classifier."""
    orthogonal_map: Literal["matrix_exp", "cayley", "householder"] = "matrix_exp"
    """How bt2's and oca's orthogonal matrices are parametrised; matrix_exp is the authors', cayley many times
    faster on a CPU."""
    weights: LossWeights = field(default_factory=LossWeights)
    """Weights of the parts of the loss; by default those of the method's authors."""
    label_smoothing: float = 0.1
    """Label smoothing of independent, bct and oca; bt2 has none."""
    preprocessing: ImagePreprocessing = field(default_factory=ImagePreprocessing)
    """How images become pixels, and how they are augmented."""
    training: BackboneTraining = field(default_factory=lambda: BackboneTraining(epochs=100, warmup_epochs=5))
    """How to train; nothing is held out, so that eval_every has no effect."""
    sync_batchnorm: bool = True
    """Let batch norm see the whole batch when several GPUs split it; on a CPU a process sees its own part."""
    embed_batch_size: int = 128
    """Images per forward pass of the models that it learns from and is measured against."""
    overwrite: bool = False
    """Start afresh in an output directory that holds another run."""

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            ConfigError: If one cannot be used, or the method lacks a model or is given one too many.
        """
        if not self.output_dir.strip():
            raise ConfigError("--output_dir is missing; say where everything goes")
        for name, least in (("new_dim", 1), ("extra_dims", 0), ("embed_batch_size", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"--{name} must be at least {least}, got {value}")
        check_method(
            self.method, self.old, self.independent, self.weights, self.label_smoothing, self.test is not None
        )
