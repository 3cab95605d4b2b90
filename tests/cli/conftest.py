"""Two tiny models, a store and a gallery of scenes under the old one, and the command line."""

from __future__ import annotations

import io
import json
import shutil
from typing import NamedTuple

import pytest
import tiny
from backfills import COUNT, SCENES

from xbt.cli import main
from xbt.encoders import load_encoder
from xbt.index import Gallery
from xbt.projections import fit_projection
from xbt.store import EmbeddingStore

TEXTS = [f"a {size} {colour} {shape}" for size in ("large", "small") for colour in ("red", "blue", "green")
         for shape in ("circle", "star", "square")]  # fmt: skip


class Said(NamedTuple):
    status: int
    out: str
    err: str

    @property
    def document(self):
        return json.loads(self.out)


@pytest.fixture
def run(capsys, monkeypatch):
    """Run ``xbt`` in this process."""

    def call(*words, stdin=None):
        if stdin is not None:
            monkeypatch.setattr("sys.stdin", io.StringIO(stdin))
        capsys.readouterr()
        status = main([str(word) for word in words])
        return Said(status, *capsys.readouterr())

    return call


@pytest.fixture(scope="session")
def specs(tmp_path_factory):
    """The specifications of an old model of dimension 16 and a new one of dimension 24."""
    folder = tmp_path_factory.mktemp("models")
    return (
        tiny.tiny_open_clip(folder / "old", context_length=77),
        tiny.tiny_open_clip(folder / "new", seed=1, dim=24, context_length=77),
    )


@pytest.fixture(scope="session")
def old(specs):
    return load_encoder(specs[0])


@pytest.fixture(scope="session")
def new(specs):
    return load_encoder(specs[1])


def _scenes():
    return [SCENES.image(row) for row in range(COUNT)]


@pytest.fixture(scope="session")
def _stores(tmp_path_factory, old, new):
    """Stores of scenes and of texts under both models."""
    root = tmp_path_factory.mktemp("stores")
    for side, encoder in (("old", old), ("new", new)):
        for what, vectors, ids, columns in (
            ("images", encoder.encode_images(_scenes()), SCENES.ids, {"number": list(range(COUNT))}),
            (
                "texts",
                encoder.encode_texts(TEXTS),
                [f"text-{n}" for n in range(len(TEXTS))],
                {"caption": TEXTS},
            ),
        ):
            modality = what.removesuffix("s").replace("texts", "text")
            store = EmbeddingStore.create(
                root / f"{side}_{what}", modality=modality, space=encoder.space, dtype="float32"
            )
            store.append(vectors, ids, columns)
    return root


@pytest.fixture
def stores(_stores, tmp_path):
    """Copies that a test may spoil."""
    return shutil.copytree(_stores, tmp_path / "stores")


@pytest.fixture
def gallery(tmp_path, stores):
    """The path of a gallery of 60 scenes under the old model."""
    made = Gallery.create(tmp_path / "gallery", store=stores / "old_images")
    made.close()
    return tmp_path / "gallery"


@pytest.fixture(scope="session")
def projection(old, new, tmp_path_factory):
    """The directory of a projection from the new space to the old one."""
    path = tmp_path_factory.mktemp("fitted") / "projection"
    fitted = fit_projection(
        new.encode_texts(TEXTS), old.encode_texts(TEXTS), new_space=new.space, old_space=old.space
    )
    fitted.save_pretrained(path)
    return path
