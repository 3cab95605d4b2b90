"""The notebooks: each agrees with its source, shows what it promises, and runs from a clean checkout."""

from __future__ import annotations

import gzip
import importlib
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import jupytext
import labelled
import nbformat
import open_clip
import pytest
import tiny
from nbclient import NotebookClient

import xbt
import xbt.data
from xbt.data import CaptionSource, PairSource, load_labelled, load_pairs, make_scenes, read_captions
from xbt.data.synthetic import ClassWorld

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "notebooks"
NAMES = [
    "01_upgrade_a_gallery",
    "02_text_to_image_search_before_and_after",
    "03_which_projection",
    "04_backfill_while_serving",
    "05_compatible_backbones",
]
SWITCH = "## With your own models"


@pytest.fixture(params=NAMES)
def notebook(request):
    """A notebook as it is stored."""
    return read(request.param)


def read(name: str) -> nbformat.NotebookNode:
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def outputs(notebook) -> list[nbformat.NotebookNode]:
    return [output for cell in notebook.cells for output in cell.get("outputs", ())]


def printed_text(notebook) -> str:
    """Everything that was printed, and tables."""
    found = outputs(notebook)
    return "".join(each.get("text", "") + each.get("data", {}).get("text/markdown", "") for each in found)


def switch_code(notebook) -> str:
    """The commented lines that switch to a user's own models, without the comment signs."""
    places = [i for i, cell in enumerate(notebook.cells) if SWITCH in cell.source]
    assert len(places) == 1, "exactly one cell is headed so"
    cell = notebook.cells[places[0] + 1]
    assert cell.cell_type == "code"
    lines = cell.source.splitlines()
    assert all(line == "#" or line.startswith("# ") for line in lines)
    return "\n".join(line[2:] for line in lines)


def test_these_are_all_notebooks():
    assert sorted(path.stem for path in FOLDER.glob("*.py")) == NAMES
    assert sorted(path.stem for path in FOLDER.glob("*.ipynb")) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_is_made_from_its_source(name):
    source = jupytext.read(FOLDER / f"{name}.py")
    stored = [(cell.cell_type, cell.source) for cell in read(name).cells]
    assert stored == [(cell.cell_type, cell.source) for cell in source.cells]


def test_it_is_stored_with_its_outputs(notebook):
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    # Only what was run in one go, from top to bottom, is stored.
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    kinds = {kind for output in outputs(notebook) for kind in output.get("data", ())}
    assert "image/png" in kinds
    assert printed_text(notebook)


def test_what_is_stored_is_small_and_says_nothing_of_a_machine(notebook):
    assert len(nbformat.writes(notebook)) < 500_000
    assert not [output for output in outputs(notebook) if output.output_type == "error"]
    assert not [output for output in outputs(notebook) if output.get("name") == "stderr"]
    text = nbformat.writes(strip_pictures(notebook))
    for path in (str(Path.home()), str(ROOT), "/tmp", "/home/", "/Users/", "site-packages", "Warning"):
        assert path not in text.replace("UnverifiedSpaceWarning", "")


def strip_pictures(notebook) -> nbformat.NotebookNode:
    """Without pictures, whose letters may spell anything."""
    for output in outputs(notebook):
        output.get("data", {}).pop("image/png", None)
    return notebook


def test_it_opens_with_what_will_be_seen(notebook):
    first = notebook.cells[0]
    assert first.cell_type == "markdown"
    assert first.source.startswith("# ")
    promised = first.source.split("You will see\n", 1)[1]
    assert 3 <= len(re.findall(r"^- ", promised, re.MULTILINE)) <= 5


def test_it_ends_with_what_to_read_next(notebook):
    last = notebook.cells[-1].source
    assert last.startswith("## What to read next")
    assert "../docs/" in last
    assert len(links(last)) >= 3


def test_its_links_lead_somewhere(notebook):
    prose = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    for target, heading in links(prose):
        path = FOLDER / target
        assert path.is_file(), f"{target} does not exist"
        if heading:
            assert heading in anchors(path.read_text(encoding="utf-8")), f"{target} has no heading {heading}"


def links(markdown: str) -> list[tuple[str, str]]:
    """Targets of the links and the headings in them."""
    return re.findall(r"\]\(([^)#]+)(?:#([^)]+))?\)", markdown)


def anchors(markdown: str) -> set[str]:
    """What the headings of a page are linked by."""
    headings = re.findall(r"^#+ (.+)$", markdown, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_cells_are_short(notebook):
    for cell in notebook.cells:
        lines = [line for line in cell.source.splitlines() if line.strip()]
        assert len(lines) <= 32, cell.source


def test_the_code_for_own_models_names_what_there_is(notebook):
    code = switch_code(notebook)
    compile(code, "own models", "exec")
    assert OLD in code
    for module, names in re.findall(r"^from (xbt[\w.]*) import (.+)$", code, re.MULTILINE):
        assert all(hasattr(importlib.import_module(module), name) for name in names.split(", "))


OLD, NEW = "open_clip:ViT-B-32-quickgelu/openai", "transformers:openai/clip-vit-large-patch14"


@pytest.fixture(scope="module")
def own_files(tmp_path_factory):
    """Files of the names that the notebooks give, in the public formats."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "flickr30k-images").mkdir()
    scenes, records = make_scenes(32), []
    for row, captions in enumerate(scenes.captions):
        scenes.image(row).save(folder / "flickr30k-images" / f"{row}.png")
        sentences = [{"raw": text, "sentid": 5 * row + i, "imgid": row} for i, text in enumerate(captions)]
        split = "val" if row < 20 else "test"
        records.append({"filename": f"{row}.png", "split": split, "imgid": row, "sentences": sentences})
    (folder / "dataset_flickr30k.json").write_text(json.dumps({"images": records}))
    with gzip.open(folder / "captions.txt.gz", "wt") as file:
        file.write("\n".join(text for captions in scenes.captions for text in captions))
    labelled.write_cifar100(folder / "hub")
    encoders = {
        OLD: xbt.load_encoder(tiny.tiny_open_clip(folder / "old", context_length=40)),
        NEW: xbt.load_encoder(tiny.tiny_open_clip(folder / "new", seed=1, dim=24, context_length=40)),
    }
    return folder, encoders


@pytest.mark.parametrize("name", NAMES)
def test_the_code_for_own_models_works(name, own_files, monkeypatch):
    folder, encoders = own_files
    monkeypatch.chdir(folder)
    monkeypatch.setattr(xbt, "load_encoder", encoders.__getitem__, raising=False)
    local = {"root": str(folder / "hub"), "limit": None}
    monkeypatch.setattr(xbt.data, "load_labelled", lambda source: load_labelled(replace(source, **local)))
    known = (CaptionSource, PairSource, load_pairs, read_captions, ClassWorld)
    made = {"xbt": xbt, **{each.__name__: each for each in known}}
    exec(compile(switch_code(read(name)), name, "exec"), made)
    if name.startswith("05"):
        world = made["world"]
        assert world.train_inputs.shape == (200, 16)
        assert world.test_inputs.shape == (60, 16)
        assert int(world.train_labels.max()) >= made["old_classes"] > int(world.train_labels.min())
    elif name.startswith("04"):
        assert [len(made[side]) for side in ("sample", "items", "names")] == [20, 12, 12]
        assert (made["new_texts"].shape[1], made["old_texts"].shape[1]) == made["items"].dims
        assert made["new_space"].same_as(encoders[NEW].space)
    else:
        old, new = (made.get(f"{side}_spec") or made[side] for side in ("old", "new"))
        assert [old, new] in ([OLD, NEW], [encoders[OLD], encoders[NEW]])
        pairs = [each for each in made.values() if isinstance(each, xbt.data.ImageTextPairs)]
        assert [len(each) for each in pairs] == [20, 12]
        captions = made["captions"]
        assert len(list(captions if isinstance(captions, list) else read_captions(captions))) == 160


def test_the_models_for_own_use_exist():
    architecture, weights = OLD.removeprefix("open_clip:").split("/")
    assert (architecture, weights) in open_clip.list_pretrained()


# What each must have shown by its last cell; the words are looked for in what it prints.
SHOWN = {
    "01_upgrade_a_gallery": ("is needed", "chose procrustes", "new/old (auto)", "criterion"),
    "02_text_to_image_search_before_and_after": ("only after the upgrade", "new/old", "new/new", "criterion"),
    "03_which_projection": (
        "chose procrustes",
        "the old query alone",
        "auto: worse than the old query in 0 of 10",
    ),
    "04_backfill_while_serving": ("nothing backfilled", "new-photo-0", "damaged files: []"),
    "05_compatible_backbones": ("old/old", "Procrustes", "BT²", "OCA", "BCT", "update gain"),
}

# Asked in the notebook's own kernel after its last cell: conditions on what it has computed.
CONDITIONS = {
    "01_upgrade_a_gallery": """
        for way in ("T2I", "I2T"):
            before, after = (report.cell(name).recall(way) for name in ("old/old", "new/old (auto)"))
            again = report.cell("new/new").recall(way)
            assert sum(before.values()) < sum(after.values()) < sum(again.values()), (before, after, again)
            assert before[1] < after[1] < again[1], (before, after, again)
    """,
    "02_text_to_image_search_before_and_after": """
        assert len(fixed) > len(broken) > 0
        for way in ("T2I", "I2T"):
            before, after = (sum(report.cell(name).recall(way).values()) for name in ("old/old", "new/old"))
            assert before < after, (way, before, after)
        hits = {cell: float((where == 0).double().mean()) for cell, where in place.items()}
        assert hits["old/old"] < hits["new/old"] < hits["new/new"], hits
        assert len(list(Path("runs/notebooks").glob("*.png"))) >= 3
    """,
    "03_which_projection": """
        cells = [found["auto", way] for found in gains.values() for way in titles]
        assert len(cells) == 10 and all(cell.estimate >= 0 for cell in cells), cells
        assert sum(cell.low > 0 for cell in cells) >= 5, cells
        assert all(gains["worse"]["procrustes", way].high < 0 for way in titles)
        assert not any(fallback.deployed(way) for way in titles)
        assert all(gain(contenders["auto"][way], measured_on, way).estimate >= 0 for way in titles)
        assert set(METHODS) < set(contenders)
    """,
    "04_backfill_while_serving": """
        assert new_new > new_old + 0.05
        for name, each in curves.items():
            assert each.recall[0] == new_old and abs(each.recall[-1] - new_new) < 1e-12, name
        sides = (to_old(items.new_texts), items.old_images), (items.new_texts, items.new_images)
        answers = items.positives("T2I")
        ends = [float((best_positive_ranks(*side, answers) < 1).double().mean()) for side in sides]
        assert served[0] == (0.0, ends[0]) and served[-1] == (1.0, ends[1]), (served[0], served[-1], ends)
        assert len(gallery.parts) == 1 and sorted(gallery.ids) == sorted(names) and gallery.verify() == []
    """,
    "05_compatible_backbones": """
        reached = {name: found[0].mean_average_precision for name, found in cells.items()}
        assert reached.pop("independent") < 0.1 < old_old.mean_average_precision
        assert all(value > old_old.mean_average_precision for value in reached.values()), reached
        assert goal > old_old.mean_average_precision + 0.2
        assert reached.pop("Procrustes") > max(reached.values()) - 0.02
        assert sweep[32][1].mean_average_precision > sweep[0][1].mean_average_precision
    """,
}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A fresh checkout: nothing is trained yet, and what one notebook trains the next one finds."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("recipes/configs", "notebooks"):
        shutil.copytree(ROOT / name, folder / name)
    return folder


@pytest.mark.slow
@pytest.mark.timeout(1800)  # two minutes at most on two idle cores
@pytest.mark.parametrize("name", NAMES)
def test_it_runs(name, checkout):
    notebook = read(name)
    lines = CONDITIONS[name].strip("\n").splitlines()
    notebook.cells.append(nbformat.v4.new_code_cell("\n".join(line[8:] for line in lines)))
    resources = {"metadata": {"path": str(checkout / "notebooks")}}
    NotebookClient(notebook, timeout=1700, resources=resources).execute()
    assert not [output for output in outputs(notebook) if output.get("name") == "stderr"]
    assert all(words in printed_text(notebook) for words in SHOWN[name])
    pictures = [output for output in outputs(notebook) if "image/png" in output.get("data", {})]
    stored = [output for output in outputs(read(name)) if "image/png" in output.get("data", {})]
    assert len(pictures) == len(stored)
