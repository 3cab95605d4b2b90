"""README and docs/: code that runs, commands that parse, links that lead somewhere."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys

import pytest
import tiny
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from docpages import PAGES, ROOT, blocks_of, command_lines, furnish, run_page

from xbt.config import parse_config
from xbt.index import Gallery

OWN_TESTS = "".join(path.read_text(encoding="utf-8") for path in ROOT.glob("tests/*/test_docs.py"))
"""Tests of single pages, which are run there: docs/serving.md is one of them."""
RUN = [
    page
    for page in PAGES
    if f"docs/{page.name}" not in OWN_TESTS and any(not b.excuse for b in blocks_of(page))
]
LINKING = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
ACCELERATE = sorted((ROOT / "recipes/configs/accelerate").glob("*.yaml"))


def name(path):
    return str(path.relative_to(ROOT))


def prose(page):
    """A page without its fenced blocks and its code."""
    return re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(encoding="utf-8"), flags=re.S)


def anchors(page):
    """The anchors that GitHub gives a page's headings."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    titles = [re.sub(r"[`*]", "", title) for title in re.findall(r"^#+ (.+)$", text, re.M)]
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", LINKING, ids=name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name} links to {target}, which does not exist"
        assert not anchor or anchor in anchors(file), f"{page.name} links to {target}; no such heading"


@pytest.mark.parametrize("page", LINKING, ids=name)
def test_files_that_are_named_exist(page):
    named = re.findall(r"(?<![\w/.])(?:recipes|tests|xbt)/[\w/]+\.\w+", page.read_text(encoding="utf-8"))
    missing = {path for path in named if not (ROOT / path).exists()}
    assert not missing


def test_every_page_is_in_the_index():
    index = (ROOT / "docs/README.md").read_text(encoding="utf-8")
    assert {page.name for page in (ROOT / "docs").glob("*.md")} <= {
        *re.findall(r"\((\w+\.md)\)", index),
        "README.md",
    }


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_fences_are_blocks_and_blocks_are_run_or_excused(page):
    text, blocks = page.read_text(encoding="utf-8"), blocks_of(page)
    assert text.count("```") == 2 * len(blocks)
    assert text.count("<!-- not run: ") == sum(1 for block in blocks if block.excuse)
    assert all(block.excuse or block.language in ("python", "bash", "yaml", "text", "") for block in blocks)


def config_class(script):
    """The config of a recipe or benchmark, by what its last line runs."""
    found = re.search(r"run_recipe\(\w+, (\w+)\)", script.read_text(encoding="utf-8"))
    assert found, f"{script} runs no recipe"
    spec = importlib.util.spec_from_file_location(f"docs_{script.stem}", script)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return getattr(module, found[1])


def recipe_calls(page):
    """(launcher's words, script, flags) of every recipe that a page's shell blocks start."""
    for block in blocks_of(page):
        lines = command_lines(block.text) if block.language == "bash" else []
        for words in lines:
            words = [part for word in words for part in (word.split() if "recipes/" in word else [word])]
            scripts = [number for number, word in enumerate(words) if re.match(r"recipes/[\w/]+\.py$", word)]
            if scripts:
                yield words[: scripts[0]], ROOT / words[scripts[0]], words[scripts[0] + 1 :]


@pytest.mark.parametrize("page", [page for page in PAGES if list(recipe_calls(page))], ids=name)
def test_commands_parse(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(str(ROOT / "recipes/benchmarks"))
    for launcher, script, flags in recipe_calls(page):
        if "accelerate" in launcher:
            start = launcher.index("launch") + 1
            words = [
                re.sub(r"^\\?\$.*", "1", word) for word in launcher[start:]
            ]  # variables of a shell script
            launch_command_parser().parse_args([*words, str(script)])
        parse_config(config_class(script), flags)


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    furnish(tmp_path)
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("page", RUN, ids=name)
def test_every_block_runs_in_order(page, place, monkeypatch):
    run_page(page, monkeypatch)
    if page.name == "README.md":
        assert (place / "runs/scenes/evaluation/retrieval.json").is_file()
        assert Gallery.open(place / "runs/scenes/backfilled_gallery").fraction_backfilled == 1


def test_make_targets_exist():
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    named = re.findall(r"^make (\w+)", (ROOT / "README.md").read_text(encoding="utf-8"), re.M)
    assert {"demo", "test"} <= set(named) <= set(targets)


@pytest.mark.parametrize("path", ACCELERATE, ids=lambda path: path.stem)
def test_accelerate_reads_its_configs(path, tmp_path):
    config = load_config_from_file(str(path))
    assert config.num_processes >= config.num_machines >= 1
    known = vars(launch_command_parser().parse_args(["x.py"]))
    assert set(config.fsdp_config) <= set(known)
    broken = tmp_path / "broken.yaml"
    broken.write_text(path.read_text(encoding="utf-8") + "num_procesess: 2\n", encoding="utf-8")
    with pytest.raises(ValueError, match="num_procesess"):
        load_config_from_file(str(broken))
    assert path.name in (ROOT / "docs/scaling.md").read_text(encoding="utf-8")
    assert (
        yaml.safe_load(path.read_text(encoding="utf-8"))["distributed_type"] == config.distributed_type.value
    )


def test_there_are_configs_for_accelerate():
    assert {"single_gpu", "multi_gpu", "multi_node", "fsdp", "cpu_two_processes"} == {
        p.stem for p in ACCELERATE
    }


@pytest.mark.slow
def test_two_cpu_processes_find_each_other(tmp_path):
    spec = tiny.tiny_open_clip(tmp_path / "model", context_length=77)
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--config_file",
        "recipes/configs/accelerate/cpu_two_processes.yaml", "recipes/pretrain_text_projection.py",
        "--old", spec, "--new", spec, "--captions.source", "scenes", "--captions.limit", "60",
        "--output_dir", str(tmp_path / "out"), "--training.steps", "1", "--training.batch_size", "16",
        "--held_out", "10",
    ]  # fmt: skip
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, timeout=400)
    assert '"processes": 2' in (tmp_path / "out/result.json").read_text()
