"""Two tiny models and a gallery of scenes that the old one has embedded."""

from __future__ import annotations

import json

import pytest
import tiny
from backfills import COUNT, SCENES

from xbt.backfill import BackfillConfig
from xbt.data.image_collection import ImageCollection
from xbt.encoders import load_encoder
from xbt.index import Gallery


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """The specifications of an old model of dimension 16 and a new one of dimension 24."""
    folder = tmp_path_factory.mktemp("models")
    return (
        tiny.tiny_open_clip(folder / "old", context_length=77),
        tiny.tiny_open_clip(folder / "new", seed=1, dim=24, context_length=77),
    )


@pytest.fixture(scope="session")
def old(models):
    return load_encoder(models[0])


@pytest.fixture(scope="session")
def new(models):
    return load_encoder(models[1])


@pytest.fixture(scope="session")
def old_vectors(old):
    return old.encode_images([SCENES.image(row) for row in range(COUNT)])


@pytest.fixture(scope="session")
def new_vectors(new):
    return new.encode_images([SCENES.image(row) for row in range(COUNT)])


@pytest.fixture
def gallery(tmp_path, old, old_vectors):
    """The path of a gallery of 60 scenes."""
    made = Gallery.create(tmp_path / "gallery", space=old.space, dtype="float32")
    made.add(old_vectors, SCENES.ids, metadata={"number": list(range(COUNT))})
    made.close()
    return tmp_path / "gallery"


@pytest.fixture
def config(gallery, models, tmp_path):
    """Makes configs of short jobs."""

    def make(**options):
        options = {
            "gallery": str(gallery), "encoder": models[1],
            "images": ImageCollection("scenes", limit=COUNT, seed=5, split="test"),
            "output_dir": str(tmp_path / "out"), "old": models[0], "commit_every": 10, "evaluate_every": 20,
            "batch_size": 4, "num_workers": 0, **options,
        }  # fmt: skip
        return BackfillConfig(**options)

    return make


@pytest.fixture
def photos(tmp_path, old, old_vectors):
    """The scenes as files under Karpathy's split file, one of them broken and one missing, and their gallery.

    Returns the options of a config for them.
    """
    folder = tmp_path / "photos"
    folder.mkdir()
    names = [f"{row:03d}.png" for row in range(COUNT)]
    for row, name in enumerate(names):
        SCENES.image(row).save(folder / name)
    (folder / names[7]).write_bytes(b"no image")
    (folder / names[30]).unlink()
    entries = [
        {"filename": name, "split": "test", "sentences": [{"raw": caption} for caption in captions]}
        for name, captions in zip(names, SCENES.captions, strict=True)
    ]
    (tmp_path / "dataset.json").write_text(json.dumps({"images": entries, "dataset": "scenes"}))
    made = Gallery.create(tmp_path / "photo_gallery", space=old.space, dtype="float32")
    made.add(old_vectors, names)
    made.close()
    where = {"source": str(tmp_path / "dataset.json"), "image_root": str(folder)}
    return {"gallery": str(made.path), "images": ImageCollection(**where)}
