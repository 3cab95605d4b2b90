"""The settings of the commands that make, fill and look after galleries."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from xbt.config import require_local
from xbt.errors import ConfigError


@dataclass
class CreateConfig:
    """Make a gallery: of a store that is there, or an empty one for the vectors of an encoder."""

    gallery: str
    """Its directory, which must be empty or not exist."""
    store: str | None = None
    """A store, or a folder that clip-retrieval wrote, whose items become the gallery's first ones. It is read
    where it is and must stay there."""
    encoder: str | None = None
    """The encoder whose vectors the gallery is for; needed unless the store says it."""
    modality: Literal["image", "text"] | None = None
    """What the vectors are of; needed only for a clip-retrieval folder that holds both."""
    index: str = "Flat"
    """A string of FAISS's index_factory: Flat (exact), IVF1024,Flat, HNSW32, ..."""
    tuning: str = ""
    """Search parameters of the index, such as nprobe=64 or efSearch=128."""
    dtype: Literal["float16", "float32"] = "float16"
    """Of the vectors on disk that are added later."""

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            ConfigError: If nothing says of which space the vectors are, or the gallery is a URL.
        """
        require_local(self.gallery, "--gallery")
        if self.store is None and self.encoder is None:
            raise ConfigError("give --store, or --encoder for an empty gallery of its space")


@dataclass
class AddConfig:
    """Add a store's items to a gallery: to its part of the same space, with ids and metadata."""

    gallery: str
    """The gallery's directory."""
    store: str
    """The store (xbt embed makes one), whose vectors are copied."""
    existing: Literal["error", "skip", "replace"] = "error"
    """What to do with items that the gallery has already: refuse and add nothing, leave them as they are, or
    put the store's in their place. After a kill, skip goes on."""
    batch_size: int = 65_536
    """Items per write."""

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            ConfigError: If the batch size is below 1.
        """
        if self.batch_size < 1:
            raise ConfigError(f"--batch_size must be at least 1, got {self.batch_size}")


@dataclass
class RemoveConfig:
    """Remove items from a gallery; all of them or, if one is not there, none."""

    gallery: str
    """The gallery's directory."""
    ids: str | list[str] = field(default_factory=list)
    """The items' ids."""
    file: str | None = None
    """A file with an id on each line; - is standard input."""


@dataclass
class GalleryConfig:
    """Look at a gallery or store as a whole."""

    gallery: str
    """The directory of a gallery or, to look at it, of a store."""
