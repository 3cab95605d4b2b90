"""What tests of the documentation share: its pages, their blocks of code, and what the pages presuppose."""

from __future__ import annotations

import re
import runpy
import shlex
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

import tiny

from xbt.compatible import CompatibleEncoder
from xbt.data import make_scenes, read_captions
from xbt.encoders import load_encoder
from xbt.projections import fit_projection
from xbt.store import EmbeddingStore

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
STAND_INS = {
    "open_clip:ViT-B-32-quickgelu/openai": "open_clip:local-dir:runs/quickstart/old/model",
    "transformers:openai/clip-vit-large-patch14": "open_clip:local-dir:runs/quickstart/new/model",
}
"""Tiny models in the place of those that would have to be downloaded."""
TRAINING = "--training.steps 2 --training.batch_size 16 --training.warmup_steps 1 --training.eval_every 2"
QUICK = {
    "embed": "--batch_size 16 --num_workers 0",
    "pretrain_text_projection": f"--captions.limit 100 --held_out 20 {TRAINING}",
    "finetune_lora": f"--pairs.limit 50 {TRAINING}",
    "evaluate_retrieval": "--pairs.limit 20",
    "choose_projection": "--captions.limit 60 --pairs.limit 30",
    "backfill": "--images.limit 60 --support.limit 30 --evaluation.limit 20 --num_workers 0",
    "export_gallery": "",
    "upgrade_report": "--sample 60 --pairs.limit 60 --captions.limit 60",
}
"""Flags that make a recipe quick; they come last, and a recipe that is not here is not run."""
_BLOCK = re.compile(r"(?:^<!-- (not run: [^\n]+) -->\n)?^```(\w*)\n(.*?)^```$", re.S | re.M)


class Block(NamedTuple):
    """A fenced block: why it is not run (or an empty string), its language, and its text."""

    excuse: str
    language: str
    text: str


def blocks_of(page: Path) -> list[Block]:
    """The fenced blocks of a page, in order."""
    return [Block(*found) for found in _BLOCK.findall(page.read_text(encoding="utf-8"))]


def command_lines(text: str) -> list[list[str]]:
    """The words of every line of a shell block, continued lines joined; comments are left out."""
    lines = text.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def with_stand_ins(text: str) -> str:
    """A block with tiny models in the place of real ones."""
    for real, small in STAND_INS.items():
        text = text.replace(real, small)
    return text


def furnish(place: Path) -> None:
    """Fills a directory with what the pages presuppose: two CLIPs, photos and their store, captions."""
    specs = {}
    for seed, (name, dim) in enumerate((("old", 16), ("new", 24))):
        folder = f"runs/quickstart/{name}/model"
        tiny.tiny_open_clip(place / folder, seed=seed, dim=dim, context_length=77)
        specs[name] = f"open_clip:local-dir:{folder}"
    shutil.copytree(ROOT / "recipes" / "configs", place / "recipes" / "configs")
    old, new = load_encoder(specs["old"]), load_encoder(specs["new"])
    captions = read_captions("scenes")[:80]
    (place / "captions.txt").write_text("\n".join(captions) + "\n", encoding="utf-8")
    (place / "photos").mkdir()
    names = [f"{number}.png" for number in range(30)] + ["new-0.png", "new-1.png"]
    for name, image in zip(names, make_scenes(len(names)).images, strict=True):
        image.save(place / "photos" / name)
    vectors = old.encode_images([place / "photos" / name for name in names[:30]])
    store = EmbeddingStore.create(place / "stores/photos_b32", modality="image", space=old.space)
    store.append(vectors, names[:30])
    projection = fit_projection(
        new.encode_texts(captions), old.encode_texts(captions), new_space=new.space, old_space=old.space
    )
    CompatibleEncoder(new, projection).save_pretrained(place / "l14-speaks-b32")


def run_command(words: list[str], monkeypatch) -> None:
    """Runs a recipe or an xbt command as a page starts it, in this process and with little to do."""
    line = " ".join(words)
    if words[0] == "xbt":
        from xbt.cli import main

        assert main(words[1:]) in (0, 1), line
        return
    assert words[:2] == ["accelerate", "launch"], f"{line} is not run; say why above the block"
    start = next(number for number, word in enumerate(words) if word.startswith("recipes/"))
    recipe = Path(words[start])
    assert recipe.stem in QUICK, f"{recipe} is not run; say why above the block, or how to make it quick"
    few = ["--images.limit", "60", "--shard_size", "30"] if "embed_scenes" in line else []
    monkeypatch.setattr(
        sys, "argv", [recipe.name, *words[start + 1 :], *shlex.split(QUICK[recipe.stem]), *few]
    )
    status: object = 0
    try:
        runpy.run_path(str(ROOT / recipe), run_name="__main__")
    except SystemExit as ended:
        status = ended.code
    # A report may say no, which tiny models deserve; everything else has to succeed.
    assert status in ((0, 1) if recipe.stem == "upgrade_report" else (0, None)), f"{line}: status {status}"


def run_page(page: Path, monkeypatch) -> dict[str, object]:
    """Runs the blocks of a page in order, Python in one namespace; returns the namespace."""
    names: dict[str, object] = {"__name__": page.stem}
    for block in blocks_of(page):
        text = with_stand_ins(block.text)
        if block.excuse:
            continue
        if block.language == "python":
            exec(compile(text, page.name, "exec"), names)
        elif block.language == "bash":
            for words in command_lines(text):
                run_command(words, monkeypatch)
    return names
