"""The settings of ``xbt search``."""

from __future__ import annotations

from dataclasses import dataclass, field

from xbt.errors import ConfigError


@dataclass
class Queries:
    """What to search for."""

    texts: str | list[str] = field(default_factory=list)
    """Texts; words without a flag are the same, and a lone - reads standard input."""
    file: str | None = None
    """A file with a text on each line; - is standard input."""
    images: str | list[str] = field(default_factory=list)
    """Pictures: files, or folders that are searched with the folders below them."""


@dataclass
class SearchConfig:
    """Search a gallery with texts or pictures.

    Vectors of a foreign space are refused. While a gallery is backfilled, each part is searched by a model of
    its space, and the results are merged.
    """

    gallery: str
    """The gallery's directory; a store will do as well, and is searched exactly, in memory."""
    encoder: str
    """What makes the queries: an encoder such as open_clip:ViT-B-32-quickgelu/openai, or the directory or Hub
    repository (org/name@revision) of a compatible encoder or a projection."""
    queries: Queries = field(default_factory=Queries)
    """What to search for."""
    k: int = 10
    """Results per query, at most as many as there are items."""
    new: str | None = None
    """The new encoder: it makes the queries of a backfilled part, and stands in for the one that a compatible
    encoder or projection has on record."""
    old: str | None = None
    """The old encoder, where an ensemble needs it and the one on record does not hold on this machine."""
    part: str | None = None
    """Search this part alone: old or new."""
    merge: str | None = None
    """How the two parts of a gallery are merged: raw, rank, or a file; by default the gallery's own
    merge.json, which xbt backfill --support writes."""
    batch_size: int = 256
    """Queries per forward pass."""
    device: str | None = None
    """Where the encoders run; the GPU if there is one."""

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            ConfigError: If a number is too small, or ``merge`` is of no use.
        """
        for name in ("k", "batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name} must be at least 1, got {getattr(self, name)}")
        if self.part is not None and self.merge is not None:
            raise ConfigError(
                f"--merge merges both parts, and --part {self.part} searches one; leave one out"
            )
