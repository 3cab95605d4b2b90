"""Worlds of vectors as files, and pictures with captions that go with them."""

from __future__ import annotations

import json

import numpy as np
from PIL import Image

from xbt.data.synthetic import WORLDS, make_vector_world
from xbt.report import UpgradeReportConfig, VectorSource

KEYS = {
    "old_images": "val_old_image",
    "new_images": "val_new_image",
    "old_texts": "val_old_text",
    "new_texts": "val_new_text",
    "old_corpus": "corpus_old_text",
    "new_corpus": "corpus_new_text",
}
N_IMAGES = 80
HOSTILE = '<script>alert("x")</script> & <img src=http://example.org/x.png onerror=alert(1)>'


def write_world(path, name="much better", n_images=N_IMAGES, n_corpus=600, seed=0):
    """Writes a world as an .npz file with the keys above; returns its path."""
    world = make_vector_world(*WORLDS[name], n_corpus=n_corpus, n_support=1, n_test=n_images, seed=seed)
    arrays = {KEYS[role]: world.test[role].numpy() for role in KEYS if not role.endswith("corpus")}
    arrays |= {"corpus_old_text": world.corpus_old.numpy(), "corpus_new_text": world.corpus_new.numpy()}
    np.savez(path, owner=world.test["image_of_text"].numpy(), **arrays)
    return str(path)


def write_pictures(folder, n_images=N_IMAGES):
    """Writes as many pictures with five captions each, hostile ones among them; returns the split file."""
    images = []
    for row in range(n_images):
        Image.new("RGB", (96, 72), (2 * row % 256, 90, 40)).save(folder / f"{row}.png")
        captions = [f"picture {row} shown {number} times {HOSTILE}" for number in range(5)]
        sentences = [{"raw": text, "tokens": text.split()} for text in captions]
        images.append({"filename": f"{row}.png", "split": "val", "sentences": sentences})
    path = folder / "dataset.json"
    path.write_text(json.dumps({"images": images, "dataset": "toy"}))
    return str(path)


def config_of(file, output_dir, **changes):
    keys = {**KEYS, **changes.pop("keys", {})}
    return UpgradeReportConfig(str(output_dir), vectors=VectorSource(file=file, **keys), **changes)
