"""docs/serving.md, run from top to bottom with tiny models."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import faiss
import pytest
import tiny
from upgrades import TEXTS

from xbt.compatible import CompatibleEncoder
from xbt.data import make_scenes
from xbt.encoders import load_encoder
from xbt.projections import fit_projection
from xbt.store import EmbeddingStore

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/serving.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"(?:<!-- (not run: [^\n]+) -->\n)?```(\w+)\n(.*?)```", PAGE, re.S)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A directory with what the page presupposes: photos, their store, a FAISS index, a saved encoder."""
    monkeypatch.chdir(tmp_path)
    old = load_encoder(tiny.tiny_open_clip(tmp_path / "models/old"))
    new = load_encoder(tiny.tiny_transformers_clip(tmp_path / "models/new", seed=1))
    projection = fit_projection(
        new.encode_texts(TEXTS), old.encode_texts(TEXTS), new_space=new.space, old_space=old.space
    )
    CompatibleEncoder(new, projection).save_pretrained(tmp_path / "l14-speaks-b32")
    (tmp_path / "photos").mkdir()
    names = [f"{number}.png" for number in range(30)]
    for name, image in zip(names, make_scenes(30).images, strict=True):
        image.save(tmp_path / "photos" / name)
    vectors = old.encode_images([f"photos/{name}" for name in names])
    store = EmbeddingStore.create("gallery", modality="image", space=old.space, dtype="float32")
    store.append(vectors, names, {"caption": [f"photo {name}" for name in names]})
    index = faiss.IndexFlatIP(old.dim)
    index.add(vectors.numpy())
    faiss.write_index(index, "photos.faiss")
    (tmp_path / "names.json").write_text(json.dumps(names))
    return tmp_path


def run_command(line):
    """A recipe as the page launches it, without Accelerate's launcher, which takes seconds to start."""
    words = shlex.split(line)
    assert words[:2] == ["accelerate", "launch"], line
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, str(ROOT / words[2]), *words[3:]], check=True, env=environment)


def test_every_block_runs_in_order(place, capsys):
    names = {"__name__": "serving"}
    for excuse, language, text in BLOCKS:
        if excuse:
            continue
        if language == "python":
            exec(compile(text, "docs/serving.md", "exec"), names)
        else:
            assert language == "bash"
            for line in filter(None, text.splitlines()):
                run_command(line)
    output = capsys.readouterr().out
    assert "33% backfilled" in output
    assert names["answer"].shape == (1, 16)
    assert (place / "exported/gallery.sql").is_file()
    assert (place / "query.onnx").is_file()


def test_a_mixed_search_in_sql_misses_no_item():
    """Both queries see one moment, and in case they do not, the old vectors are asked first."""
    (block,) = [text for _, language, text in BLOCKS if language == "sql" and "ADD COLUMN new" in text]
    lines = [line for line in block.splitlines() if line]
    asked = [line for line in lines if line.startswith("SELECT")]
    assert ["new IS NULL" in line for line in asked] == [True, False]
    assert "new IS NOT NULL" in asked[1]
    start = next(row for row, line in enumerate(lines) if "REPEATABLE READ" in line)
    assert lines[start + 1 :] == [*asked, "COMMIT;"]
    # Indexes that are filtered afterwards would give fewer rows than asked for.
    indexes = [line for line in lines if line.startswith("CREATE INDEX")]
    assert [line.rsplit("WHERE ")[1] for line in indexes] == ["new IS NULL;", "new IS NOT NULL;"]


def test_what_is_not_run_says_why():
    assert len(BLOCKS) == PAGE.count("```") // 2
    excused = {language: excuse for excuse, language, _ in BLOCKS if excuse}
    assert set(excused) == {"sql", "bash"}
    assert all("needs PostgreSQL" in excuse for excuse in excused.values())
    assert sum(1 for excuse, language, _ in BLOCKS if language == "python" and not excuse) >= 8
