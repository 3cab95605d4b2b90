"""The splits of the projections' benchmark: what is fitted to, what is selected on, what is measured."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from projection_stores import read_stores
from torch import Tensor
from torch.nn.functional import normalize

from xbt.config import parse_config
from xbt.data import CaptionSource, PairSource, load_pairs, read_captions
from xbt.demo import DemoConfig, train_demo_clips
from xbt.encoders import load_encoder
from xbt.errors import ConfigError, TruncationWarning
from xbt.projections import PairVectors


@dataclass
class ScenesConfig:
    """The built-in scenes."""

    seeds: list[int] = field(default_factory=lambda: [3, 4, 5, 6, 7])
    """One pair of CLIPs per seed; an empty list leaves the scenes out."""
    runs_dir: str = "runs/benchmarks/upgrade_scenes"
    """Folder of the CLIPs, trained as in upgrade_scenes.py; existing ones are reused."""
    captions: int = 20_000
    """Corpus."""
    support: int = 500
    """Images to choose and to learn by."""
    test: int = 1000
    """Images to measure on."""


@dataclass
class Asked:
    """The queries of one direction.

    Attributes:
        new: (n, new_dim) under the new model.
        old: (n, old_dim) under the old one.
        gallery: (m, old_dim) what they are searched in.
        answers: For every query the gallery rows that answer it.
        groups: (n,) the image of every query.
        new_gallery: (m, new_dim) the gallery under the new model, if known.
        own: (m,) the image of the support that each gallery row is, -1 for none; ``None`` if none is.
    """

    new: Tensor
    old: Tensor
    gallery: Tensor
    answers: list[list[int]]
    groups: Tensor
    new_gallery: Tensor | None = None
    own: Tensor | None = None


@dataclass
class Split:
    """Data for fitting, for selection and for measurement.

    Attributes:
        data: Name of the data.
        number: Which split.
        corpus: New and old vectors of texts, or ``None`` where the pairs' texts are all there is.
        support: Pairs to select on and to learn by.
        asked: Queries by direction.
    """

    data: str
    number: int
    corpus: tuple[Tensor, Tensor] | None
    support: PairVectors
    asked: dict[str, Asked]

    @property
    def texts(self) -> tuple[Tensor, Tensor]:
        """Vectors that text-fitted maps are fitted to."""
        return self.corpus or (self.support.new_texts, self.support.old_texts)


def halves(path: str, name: str) -> Iterator[Split]:
    """Selected on one half of the images, measured on the other, both ways.

    Args:
        path: An .npz file with the keys of the Flickr8k file, or a folder of stores (:func:`read_stores`).
        name: What to call the data.
    """
    pairs, corpus = read_stores(path) if Path(path).is_dir() else _of_arrays(path)
    count = len(pairs)
    parts = [range(count // 2), range(count // 2, count)]
    for number, (support, test) in enumerate((parts, parts[::-1])):
        yield Split(name, number, corpus, pairs.subset(support), asked_of(pairs.subset(test)))


def _of_arrays(path: str) -> tuple[PairVectors, tuple[Tensor, Tensor]]:
    """The pairs of a file, of which every image has as many texts, and the corpus."""
    data = arrays(path)
    per_image = len(data["val_old_text"]) // len(data["val_old_image"])
    pairs = PairVectors(
        data["val_new_text"],
        data["val_old_text"],
        data["val_old_image"],
        torch.arange(len(data["val_old_image"])).repeat_interleave(per_image),
        data["val_new_image"],
    )
    return pairs, (data["corpus_new_text"], data["corpus_old_text"])


def class_folds(path: str, folds: int = 5) -> Iterator[Split]:
    """Fitted to four fifths of the classes; the others' names are searched among all exemplars."""
    data = {name: normalize(rows, dim=1) for name, rows in arrays(path).items()}
    order = np.random.default_rng(0).permutation(len(data["old_text"]))
    for number, part in enumerate(np.array_split(order, folds)):
        test = torch.from_numpy(np.sort(part))
        rest = torch.from_numpy(np.setdiff1d(order, part))
        support = PairVectors(
            data["new_text"][rest], data["old_text"][rest], data["old_image"][rest], torch.arange(len(rest))
        )
        own = torch.full((len(order),), -1)
        own[rest] = torch.arange(len(rest))
        asked = Asked(
            data["new_text"][test],
            data["old_text"][test],
            data["old_image"],
            [[int(row)] for row in test],
            torch.arange(len(test)),
            own=own,
        )
        yield Split("lvis", number, None, support, {"T2I": asked})


def article_folds(path: str, folds: int = 5) -> Iterator[Split]:
    """Fitted to and selected on the pairs of four fifths of the articles, measured on the others'.

    Captions are searched among all photos, photos among the true captions of all pairs. False captions take
    no part: they are near-copies of true ones, and would push down the photos of the articles known.

    Args:
        path: An .npz file with {old,new}_{image,text}, pairs (rows of image and text) and the article of
            every image and text.
        folds: How many.
    """
    data = {name: normalize(rows, dim=1) for name, rows in arrays(path).items()}
    with np.load(path, allow_pickle=False) as file:
        pairs, articles = torch.from_numpy(file["pairs"].astype(np.int64)), file["text_article"]
    names, article = np.unique(articles, return_inverse=True)
    fold_of_article = np.random.default_rng(0).permutation(len(names)) % folds
    fold_of_text = torch.from_numpy(fold_of_article[article])
    images, texts = pairs[:, 0], pairs[:, 1]
    for number in range(folds):
        held = fold_of_text[texts] == number
        support = PairVectors(
            data["new_text"][texts[~held]],
            data["old_text"][texts[~held]],
            data["old_image"][images[~held]],
            torch.arange(int((~held).sum())),
            data["new_image"][images[~held]],
        )
        place = torch.full((len(pairs),), -1)
        place[~held] = torch.arange(int((~held).sum()))
        own = torch.full((len(data["old_image"]),), -1)
        own[images] = place
        groups = torch.arange(int(held.sum()))
        t2i = Asked(
            data["new_text"][texts[held]],
            data["old_text"][texts[held]],
            data["old_image"],
            [[int(row)] for row in images[held]],
            groups,
            data["new_image"],
            own,
        )
        i2t = Asked(
            data["new_image"][images[held]],
            data["old_image"][images[held]],
            data["old_text"][texts],
            [[int(row)] for row in torch.nonzero(held).flatten()],
            groups,
            data["new_text"][texts],
            place,
        )
        yield Split("verite", number, None, support, {"T2I": t2i, "I2T": i2t})


def scenes(config: ScenesConfig, seed: int) -> Split:
    """Two CLIPs trained on the built-in scenes, and scenes neither of them has seen."""
    demo = parse_config(DemoConfig, ["--config", "recipes/configs/quickstart.yaml"])
    old, new = train_demo_clips(replace(demo, seed=seed, output_dir=f"{config.runs_dir}/seed_{seed}"))
    captions = read_captions(CaptionSource("scenes", limit=config.captions, seed=seed + 500_000))
    captions = list(dict.fromkeys(captions))
    encoders = {"new": load_encoder(new), "old": load_encoder(old)}
    made = load_pairs(PairSource("scenes", split="test", limit=config.support + config.test, seed=seed))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TruncationWarning)
        corpus = {side: encoder.encode_texts(captions) for side, encoder in encoders.items()}
        texts = {side: encoder.encode_texts(list(made.texts)) for side, encoder in encoders.items()}
    pictures = [made.image(row) for row in range(len(made))]
    images = {side: encoder.encode_images(pictures) for side, encoder in encoders.items()}
    owner = torch.tensor([int(rows[0]) for rows in made.positives_t2i])
    pairs = PairVectors(texts["new"], texts["old"], images["old"], owner, images["new"])
    measured = pairs.subset(range(config.support, len(made)))
    return Split(
        "scenes",
        seed,
        (corpus["new"], corpus["old"]),
        pairs.subset(range(config.support)),
        asked_of(measured),
    )


def asked_of(pairs: PairVectors) -> dict[str, Asked]:
    """Queries and galleries of a split, by direction."""
    new_galleries = {"T2I": pairs.new_images, "I2T": pairs.new_texts}
    return {
        direction: Asked(
            *pairs.queries(direction),
            pairs.gallery(direction),
            pairs.positives(direction),
            pairs.groups(direction),
            new_galleries[direction],
        )
        for direction in pairs.directions
    }


def arrays(path: str) -> dict[str, Tensor]:
    """The floating-point arrays of an .npz file as float32 tensors."""
    try:
        with np.load(path, allow_pickle=False) as file:
            loaded = {name: file[name] for name in file.files}
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read as an .npz file: {error}") from error
    return {
        name: torch.from_numpy(rows.astype(np.float32))
        for name, rows in loaded.items()
        if rows.dtype.kind == "f"
    }


def without_folders(config: dict[str, Any]) -> dict[str, Any]:
    """A config as it goes on record: of data files the names, not where they lie on this machine."""
    names = {key: Path(value).name for key, value in config.items() if str(value).endswith(".npz")}
    others = [Path(path).name for path in config.get("others", [])]
    return {**config, **names, **({"others": others} if "others" in config else {})}
