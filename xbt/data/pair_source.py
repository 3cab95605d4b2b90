"""Where image–text pairs come from, as a config says it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from xbt.data.captions import check_source
from xbt.data.files import kind_of
from xbt.data.hf_folders import HUB_PREFIX
from xbt.errors import ConfigError

_HUB_ALONE = ("subset", "image_column", "caption_column", "id_column", "split_column")
_TABLE_TOO = ("image_column", "caption_column")


@dataclass
class PairSource:
    """Where images with captions come from.

    Raises:
        ConfigError: If ``limit`` is below 1 or ``source`` is empty.
    """

    source: str
    """A Karpathy split file (dataset_*.json), a file in COCO's caption format (.json; nocaps too) or text
    with an image's name and a caption on each line (.txt, .csv, .tsv, .token; CLIP_benchmark's, Flickr's and
    Kaggle's formats), each perhaps with .gz; a folder of CLIP_benchmark's tars, local or at
    hf://datasets/ORG/NAME; hf: and a Hub data set or a local directory of parquet files; or scenes for the
    built-in world."""
    image_root: str | None = None
    """Folder that image names are relative to; the file's own folder by default."""
    split: str | None = None
    """Split to read; a + joins several (val+restval), all takes every one."""
    image_column: str | None = None
    """Column of an hf: source that holds the image, its bytes or its path, or of a .csv or .tsv file that
    holds its name; found by its name if left out."""
    caption_column: str | None = None
    """Column of an hf: source, a .csv or a .tsv file that holds a caption or a list of captions; found by its
    name if left out."""
    subset: str | None = None
    """Configuration of a Hub data set."""
    limit: int | None = None
    """Take only so many images, chosen at random with the seed, in the original order."""
    seed: int = 0
    """Seed of that choice."""
    image_size: int = 32
    """Side in pixels of the built-in scenes; other sources ignore it."""
    id_column: str | None = None
    """Column of an hf: source that names the image; rows of one name are one image with several captions."""
    split_column: str | None = None
    """Column of an hf: source that says which split a row belongs to, where the data set keeps them
    together."""

    def __post_init__(self) -> None:
        """Checks the values."""
        check_source(self.source, self.limit)

    @property
    def kind(self) -> str:
        """``"scenes"``, ``"hf"``, ``"tars"`` (a folder or URL of CLIP_benchmark's) or ``"file"``."""
        if self.source == "scenes":
            return "scenes"
        if "://" in self.source:  # before hf:, which hf:// begins with
            return "tars"
        if self.source.startswith(HUB_PREFIX):
            return "hf"
        return "tars" if Path(self.source).expanduser().is_dir() else "file"

    def check_options(self) -> None:
        """Checks that every option applies to this kind of source.

        Raises:
            ConfigError: If one does not.
        """
        table = self.kind == "file" and kind_of(Path(self.source)) in (".csv", ".tsv")
        for name in _HUB_ALONE if self.kind != "hf" else ():
            value = getattr(self, name)
            if value is not None and not (table and name in _TABLE_TOO):
                raise ConfigError(
                    f"{name} {value!r} was given with {self.source}, but only hf: sources have {name}s"
                    f"{' (and .csv and .tsv files)' if name in _TABLE_TOO else ''}; leave it out"
                )
        if self.image_root is not None and self.kind == "tars":
            raise ConfigError(
                f"image_root {self.image_root!r} was given with {self.source}, whose tars hold the images; "
                "leave it out"
            )
