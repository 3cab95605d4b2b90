"""The export recipe as a user calls it."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from xbt.config import parse_config
from xbt.index import Gallery
from xbt.serve.export import ExportConfig, run_export

ROOT = Path(__file__).parents[2]
RECIPE, CONFIG = ROOT / "recipes/export_gallery.py", ROOT / "recipes/configs/export_gallery.yaml"


@pytest.fixture
def run(monkeypatch, capsys):
    """Run the recipe in this process; return its exit status, what it printed and the error's line."""

    def call(*flags):
        monkeypatch.setattr(sys, "argv", ["export_gallery.py", *map(str, flags)])
        status = 0
        try:
            runpy.run_path(str(RECIPE), run_name="__main__")
        except SystemExit as ended:
            status = ended.code
        output = capsys.readouterr()
        assert "Traceback" not in output.err
        return status, output.out, output.err

    return call


def test_a_store_is_exported_and_exported_again(run, store, tmp_path):
    flags = ["--source", store.path, "--output_dir", tmp_path / "out", "--pgvector.table", "photos"]
    status, output, _ = run(*flags)
    assert status == 0
    assert f"exported 60 items to {tmp_path / 'out'}: vectors.npy and items.parquet, gallery.sql" in output
    first = (tmp_path / "out/gallery.sql").read_bytes()
    assert run(*flags)[0] == 0
    assert (tmp_path / "out/gallery.sql").read_bytes() == first
    assert np.array_equal(np.load(tmp_path / "out/vectors.npy"), store.read())
    assert (tmp_path / "out/config.yaml").is_file()


def test_a_gallery_on_disk_is_exported_while_it_is_written_to(run, tmp_path, rows, old_space, new_space):
    gallery = Gallery.create(tmp_path / "gallery", space=old_space, dtype="float32")
    gallery.add(rows(20), [f"a{n}" for n in range(20)], old_space)
    gallery.begin_part(new_space)
    gallery.backfill(rows(5, 24), [f"a{n}" for n in range(5)], new_space)
    with gallery.writing():
        flags = ["--source", tmp_path / "gallery", "--output_dir", tmp_path / "out"]
        status, _, output = run(*flags)
        assert (status, "name one of these parts" in output) == (2, True)
        assert run(*flags, "--part", "old", "--overwrite", "true")[0] == 0
    assert np.array_equal(np.load(tmp_path / "out/vectors.npy"), rows(20)[5:])


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "there is no store at nowhere; check the path"),
        (["--interchange", "false"], "there is nothing to write"),
        (["--pgvector.table", "a b"], "'a b' is no plain SQL name"),
        (["--pgvector.statement", "upsert"], "upsert"),
        (["--sources", "x"], "sources"),
    ],
)
def test_wrong_input_is_one_sentence(run, tmp_path, flags, words):
    status, _, error = run("--source", "nowhere", "--output_dir", tmp_path / "out", *flags)
    assert (status, words in error) == (2, True), error
    assert not (tmp_path / "out").exists()


def test_a_place_that_cannot_be_written_is_one_sentence(run, store):
    status, _, error = run("--source", store.path, "--output_dir", "/dev/null/x")
    assert (status, "--output_dir /dev/null/x cannot be written" in error) == (2, True), error


def test_several_processes_are_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(Exception, match="launch it with --num_processes 1"):
        run_export(ExportConfig("gallery", str(tmp_path)))


def test_the_config_opens_with_its_command_and_parses(monkeypatch):
    first = CONFIG.read_text(encoding="utf-8").splitlines()[0]
    assert re.fullmatch(r"# accelerate launch recipes/export_gallery.py --config (\S+)", first)
    monkeypatch.chdir(ROOT)
    config = parse_config(ExportConfig, ["--config", str(CONFIG)])
    assert (config.pgvector.table, config.pgvector.column) == ("images", "old")


def test_serving_is_imported_without_models_and_clients():
    code = (
        "import sys; from xbt.serve import export_pgvector; "
        "heavy = {'qdrant_client', 'onnx', 'onnxruntime', 'faiss', 'open_clip', 'transformers'};"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_name_of_the_package_is_there():
    import xbt.serve

    assert all(getattr(xbt.serve, name) for name in dir(xbt.serve))
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = xbt.serve.nothing
