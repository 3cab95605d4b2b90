"""The job of ``xbt search``: read queries, encode them for each part of the gallery, rank the items."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xbt.backfill import load_merge
from xbt.cli.output import read_lines
from xbt.compatible.encoder import CompatibleEncoder, load_upgraded
from xbt.data.files import is_unicode
from xbt.data.image_folder import list_images
from xbt.encoders import DualEncoder, load_encoder
from xbt.errors import ConfigError, DataError, EncoderError
from xbt.hub import split_revision
from xbt.index.gallery import Gallery
from xbt.index.mixed import Merge, RankMerge, RawMerge, merge_from_dict
from xbt.index.parts import PartSummary
from xbt.index.protocol import Hits
from xbt.serve.export import open_source
from xbt.store.layout import read_record
from xbt.store.store import EmbeddingStore


@dataclass
class Queries:
    """Texts and images to search for."""

    texts: str | list[str] = field(default_factory=list)
    """Texts, also given as positional arguments; - reads standard input."""
    file: str | None = None
    """A file with a text on each line; - is standard input."""
    images: str | list[str] = field(default_factory=list)
    """Image files, or folders, which are read with their subfolders."""


@dataclass
class SearchConfig:
    """Search a gallery with texts or images.

    Vectors of another space are refused. While a gallery is backfilled, each part is searched with a model of
    its space, and the results are merged.
    """

    gallery: str
    """Directory of a gallery, or of a store, which is searched exactly in memory."""
    encoder: str
    """Encoder of the queries: a specification such as open_clip:ViT-B-32-quickgelu/openai, or the directory
    or Hub repository (org/name@revision) of a compatible encoder or a projection."""
    queries: Queries = field(default_factory=Queries)
    """Texts and images to search for."""
    k: int = 10
    """Results per query, at most the number of items."""
    new: str | None = None
    """New encoder: for queries to a backfilled part, and in place of the one that a compatible encoder or
    projection has recorded."""
    old: str | None = None
    """Old encoder, if an ensemble needs it and its recorded specification is not valid on this machine."""
    part: str | None = None
    """Search only this part: old or new."""
    merge: str | None = None
    """Merge of the two parts' results: raw, rank, or a file; by default the gallery's merge.json, which xbt
    backfill --support writes."""
    batch_size: int = 256
    """Queries per forward pass."""
    device: str | None = None
    """Device of the encoders; by default the GPU if there is one."""

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ConfigError: If a number is too small, or ``merge`` has no effect.
        """
        for name in ("k", "batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name} must be at least 1, got {getattr(self, name)}")
        if self.part is not None and self.merge is not None:
            raise ConfigError(
                f"--merge merges both parts, and --part {self.part} searches one; leave one out"
            )


STDIN = "-"
BACKENDS = ("open_clip:", "transformers:")
_MERGES = {"raw": RawMerge, "rank": RankMerge}


@dataclass(frozen=True)
class Answer:
    """Items and scores of each query: the texts, of which there are ``n_texts``, then the paths of images."""

    gallery: str
    queries: list[str]
    n_texts: int
    hits: Hits

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able form, with ranks from 1."""
        ranked = [
            [
                {"rank": rank, "id": item, "score": float(score)}
                for rank, (item, score) in enumerate(zip(items, scores, strict=True), 1)
            ]
            for items, scores in zip(self.hits.ids, self.hits.scores, strict=True)
        ]
        kinds = ["text" if row < self.n_texts else "image" for row in range(len(self.queries))]
        return {
            "gallery": self.gallery,
            "queries": [
                {"query": query, "modality": kind, "results": results}
                for query, kind, results in zip(self.queries, kinds, ranked, strict=True)
            ],
        }

    def __str__(self) -> str:
        blocks = []
        for query, items, scores in zip(self.queries, self.hits.ids, self.hits.scores, strict=True):
            width = len(str(len(items)))
            lines = [
                f"  {rank:>{width}}  {score:7.4f}  {item}"
                for rank, (item, score) in enumerate(zip(items, scores, strict=True), 1)
            ]
            blocks.append("\n".join([query, *lines]))
        return "\n\n".join(blocks)


def run_search(config: SearchConfig) -> Answer:
    """Search a gallery or a store for the k best items of every query.

    Raises:
        XbtError: If there is no query, the gallery, an encoder or an image cannot be used, or the queries
            are in another space.
    """
    queries = read_queries(config.queries)
    gallery = open_source(config.gallery)
    if isinstance(gallery, EmbeddingStore):  # it is searched in memory
        gallery = Gallery.build(gallery.read(), gallery.ids, gallery.space)
    parts = _parts(gallery, config.part)
    merge = _merge(config, gallery) if len(parts) > 1 else None
    device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
    encoders = _encoders(config, parts, device)
    vectors = [_embed(encoder, queries, config.batch_size) for encoder in encoders]
    if merge is None:
        hits = gallery.search(vectors[0], config.k, encoders[0].space, parts[0].name)
    else:
        spaces = encoders[0].space, encoders[1].space
        hits = gallery.search_mixed(vectors[0], vectors[1], config.k, merge, *spaces)
    texts, images = list(queries.texts), list(queries.images)
    return Answer(config.gallery, texts + images, len(texts), hits)


def read_queries(queries: Queries) -> Queries:
    """Collect the texts of all sources, and list the images of folders.

    Raises:
        ConfigError: If there is no query.
        DataError: If a text is blank or not valid Unicode, a file cannot be read, or a folder holds no
            image.
    """
    texts, images = (
        [given] if isinstance(given, str) else given for given in (queries.texts, queries.images)
    )
    files = [STDIN] * (STDIN in texts) + [queries.file] * (queries.file is not None)
    if files.count(STDIN) > 1:
        raise ConfigError("standard input can be read only once; leave out - or --queries.file -")
    texts = [text for text in texts if text != STDIN]
    for file in files:
        texts += read_lines(str(file), "queries")
    for number, text in enumerate(texts, start=1):
        if not text.strip():
            raise DataError(f"query {number} is blank; write what to search for")
        if not is_unicode(text):
            raise DataError(f"query {number}, {text!r}, is not valid Unicode; write it in UTF-8")
    paths: list[str] = []
    for image in images:
        path = Path(image).expanduser()
        paths += [str(path / name) for name in list_images(path)] if path.is_dir() else [str(path)]
    if not texts and not paths:
        raise ConfigError(
            'there is nothing to search for; give a text ("a dog on a beach"), --queries.file, '
            "--queries.images, or - to read texts from standard input"
        )
    return replace(queries, texts=texts, file=None, images=paths)


def _parts(gallery: Gallery, chosen: str | None) -> list[PartSummary]:
    """Parts to search: the one asked for, or all that have items."""
    if chosen is not None:
        gallery.ids_of(chosen)  # refuses an unknown part
        return [part for part in gallery.parts if part.name == chosen]
    return [part for part in gallery.parts if part.count] or [gallery.parts[0]]


def _merge(config: SearchConfig, gallery: Gallery) -> Merge:
    if config.merge in _MERGES:
        return _MERGES[config.merge]()
    if config.merge is not None:
        return merge_from_dict(read_record(Path(config.merge).expanduser()))
    assert gallery.path is not None  # a store has one part
    try:
        return load_merge(gallery.path)
    except DataError as error:
        raise DataError(
            f"{config.gallery} is being backfilled and does not say how its parts are merged; give --merge "
            "raw, rank or a file, search one part with --part, or run the backfill with --support"
        ) from error


def _encoders(config: SearchConfig, parts: list[PartSummary], device: str) -> list[DualEncoder]:
    """An encoder for each part; where none fits, the main one, which the gallery refuses with a reason."""
    candidates = [load_searcher(config, device)]
    if isinstance(candidates[0], CompatibleEncoder):
        candidates.append(candidates[0].new)
    chosen = []
    for part in parts:
        fitting = _fitting(candidates, part)
        if fitting is None and config.new is not None:
            candidates.append(load_encoder(config.new, device))
            fitting = _fitting(candidates, part)
        if fitting is None and len(parts) > 1:
            raise ConfigError(
                f"the part {part.name!r} of {config.gallery} is in the space {part.space}; give its encoder "
                f"as --{'encoder' if part is parts[0] else 'new'}, or search one part with --part"
            )
        chosen.append(fitting or candidates[0])
    return chosen


def _fitting(encoders: list[DualEncoder], part: PartSummary) -> DualEncoder | None:
    for encoder in encoders if part.space is not None else encoders[:1]:
        if encoder.dim == part.dim and (part.space is None or part.space.same_as(encoder.space)):
            return encoder
    return None


def load_searcher(config: SearchConfig, device: str) -> DualEncoder:
    """Load the encoder, compatible encoder or projection that a config names."""
    if config.encoder.startswith(BACKENDS):
        return load_encoder(config.encoder, device)
    source, revision = split_revision(config.encoder)
    try:
        return load_upgraded(source, config.new, config.old, device, revision)
    except EncoderError as error:
        raise EncoderError(f"{error} (on the command line: --new, the new encoder, and --old)") from error


def _embed(encoder: DualEncoder, queries: Queries, batch_size: int) -> Tensor:
    """(n, dim) vectors: texts first, then images."""
    sides = (encoder.encode_texts, list(queries.texts)), (encoder.encode_images, list(queries.images))
    return torch.cat([encode(given, batch_size) for encode, given in sides if given])
