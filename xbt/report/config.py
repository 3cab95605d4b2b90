"""The settings of an upgrade report."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from xbt.data import CaptionSource, PairSource
from xbt.errors import ConfigError


@dataclass
class VectorSource:
    """Existing vectors of the same images and texts under both models.

    Each value is a key of ``file``, or the path of a store or of an .npy file.

    Raises:
        ConfigError: If only one side of the corpus is given.
    """

    old_images: str
    """Images under the old model: the gallery."""
    old_texts: str
    """Texts of these images under the old model."""
    new_texts: str
    """The same texts under the new model."""
    new_images: str | None = None
    """The same images under the new model; without them there are no image queries and no new/new."""
    old_corpus: str | None = None
    """Texts to fit projections to, under the old model; texts of the images are removed."""
    new_corpus: str | None = None
    """The same texts under the new model."""
    image_of_text: str | None = None
    """A key or .npy file with the row of the image that each text describes; by default every image has the
    same number of texts, in order."""
    file: str | None = None
    """The .npz file of the keys."""

    def __post_init__(self) -> None:
        """Check the values."""
        if (self.old_corpus is None) != (self.new_corpus is None):
            raise ConfigError(
                "--vectors.old_corpus and --vectors.new_corpus are the same texts under both models; give "
                "both or neither"
            )


@dataclass
class FailUnder:
    """Minimum results of an upgrade; a value that is not given is not checked.

    Raises:
        ConfigError: If a value cannot be reached or is no number.
    """

    T2I: float | None = None
    """Minimum gain of text queries: new/old minus old/old, in points of R@k."""
    I2T: float | None = None
    """Minimum gain of image queries, in points of R@k."""
    recovered_gain: float | None = None
    """Minimum share, in percent, of the gain of re-embedding that new/old recovers in each direction."""
    k: int = 1
    """The k of R@k; one of --ks."""
    lower_end: bool = False
    """Compare the lower end of the gain's interval with T2I and I2T, instead of the estimate."""

    def __post_init__(self) -> None:
        """Check the values."""
        for name in ("T2I", "I2T"):
            value = getattr(self, name)
            if value is not None and not -100 <= value <= 100:
                raise ConfigError(f"--fail_under.{name} is in points of R@k, from -100 to 100, got {value}")
        if self.recovered_gain is not None and not math.isfinite(self.recovered_gain):
            raise ConfigError(f"--fail_under.recovered_gain must be a number, got {self.recovered_gain}")

    @property
    def directions(self) -> dict[str, float]:
        """Minimum gain in points, for the directions that have one."""
        given = {"T2I": self.T2I, "I2T": self.I2T}
        return {direction: value for direction, value in given.items() if value is not None}


@dataclass
class UpgradeReportConfig:
    """Should you upgrade? Measure it on a sample of your own items and queries before you re-embed anything.

    Writes ``report.html``, one self-contained file, and ``report.json`` to the output directory. Give either
    both encoders and pairs, or existing vectors.
    """

    output_dir: str
    """Output directory."""
    old: str | None = None
    """The encoder that embedded the gallery."""
    new: str | None = None
    """The encoder that will query it."""
    pairs: PairSource | None = None
    """Images of the gallery with texts as users would ask for them. With vectors: the same images and texts
    in the same order, used only for display."""
    captions: CaptionSource | None = None
    """Text corpus that projections are fitted to; by default the texts of the pairs."""
    vectors: VectorSource | None = None
    """Vectors of both models, in place of encoders."""
    sample: int = 1000
    """Images to draw at random, with their texts."""
    choose_fraction: float = 0.5
    """Share of the sample that chooses the method; the rest measures it."""
    gallery_size: int = 1_000_000
    """Items of the gallery, for hours and bytes."""
    ks: list[int] = field(default_factory=lambda: [1, 5, 10])
    """Cut-offs of R@k."""
    confidence: float = 0.95
    """One-sided confidence of a gain."""
    worthwhile: float = 1.0
    """Minimum mean gain, in points of R@k over the ks, that is worth an upgrade. The answer is no if the
    sample excludes such a gain, and unknown if it excludes neither that nor zero."""
    use_old: bool = True
    """Whether the old model may run beside the new one at search time."""
    thorough: bool = False
    """Also try the trained projections, which takes minutes."""
    fail_under: FailUnder = field(default_factory=FailUnder)
    """Thresholds beyond the verdict, for automatic checks."""
    examples: int = 6
    """Queries to show of the best and of the worst changes, per direction; 0 shows none."""
    seed: int = 0
    """Seed of the sample, its split and the bootstrap."""
    device: str | None = None
    """Device of the encoders; by default the GPU if there is one."""
    overwrite: bool = False
    """Replace another report in the output directory."""

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ConfigError: If one is out of range, or the inputs are neither of the two kinds.
        """
        for name, least in (("sample", 4), ("gallery_size", 1), ("examples", 0), ("seed", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"--{name} must be at least {least}, got {getattr(self, name)}")
        if not 0 < self.choose_fraction < 1:
            raise ConfigError(
                f"--choose_fraction must lie between 0 and 1, such as 0.5, got {self.choose_fraction}"
            )
        if not 0.5 < self.confidence < 1:
            raise ConfigError(f"--confidence must lie between 0.5 and 1, such as 0.95, got {self.confidence}")
        if not 0 <= self.worthwhile <= 100:
            raise ConfigError(f"--worthwhile is in points of R@k, from 0 to 100, got {self.worthwhile}")
        if not self.ks or len(set(self.ks)) < len(self.ks) or min(self.ks) < 1:
            raise ConfigError(f"--ks must be different numbers of at least 1, such as [1, 5], got {self.ks}")
        if self.fail_under.k not in self.ks:
            raise ConfigError(
                f"--fail_under.k is {self.fail_under.k}, but --ks are {self.ks}; name one of them"
            )
        self._check_inputs()

    def _check_inputs(self) -> None:
        encoders = self.old is not None or self.new is not None
        if self.vectors is not None:
            if encoders or self.captions is not None:
                raise ConfigError(
                    "--vectors were given together with encoders or --captions; with vectors nothing is "
                    "embedded, so leave out --old, --new and --captions"
                )
            for threshold, needs in (("I2T", "image queries"), ("recovered_gain", "new/new")):
                if self.vectors.new_images is None and getattr(self.fail_under, threshold) is not None:
                    raise ConfigError(
                        f"--fail_under.{threshold} needs {needs}, and so --vectors.new_images; give them or "
                        "leave the threshold out"
                    )
        elif self.old is None or self.new is None or self.pairs is None:
            raise ConfigError(
                "give --old, --new and --pairs to embed a sample with both models, or --vectors of both; "
                "without image–text pairs nothing can be measured"
            )
