"""Every shipped config parses, says how it is run, and every recipe and model config is covered."""

from __future__ import annotations

import re
from pathlib import Path

import open_clip
import pytest

from xbt.backfill import BackfillConfig
from xbt.cli.fit import FitConfig
from xbt.config import parse_config
from xbt.demo import DemoConfig
from xbt.embedding import EmbedConfig
from xbt.encoders.open_clip import OpenClipEncoder
from xbt.evaluation.job import EvaluationConfig
from xbt.report import UpgradeReportConfig
from xbt.serve.export import ExportConfig
from xbt.training import (
    ClipConfig,
    CompatibleBackboneConfig,
    CompatibleClipConfig,
    LoraFinetuningConfig,
    TextProjectionConfig,
)
from xbt.training.clip import read_model_config

ROOT = Path(__file__).parents[2]
CONFIGS = sorted(path for path in (ROOT / "recipes").rglob("*.yaml") if path.parent.name != "accelerate")
MODELS = sorted((ROOT / "recipes" / "configs" / "models").glob("*.json"))


def config_class(recipe: str) -> type:
    known = {
        "embed": EmbedConfig,
        "train_clip": ClipConfig,
        "train_compatible_backbone": CompatibleBackboneConfig,
        "train_compatible_clip": CompatibleClipConfig,
        "pretrain_text_projection": TextProjectionConfig,
        "finetune_lora": LoraFinetuningConfig,
        "evaluate_retrieval": EvaluationConfig,
        "export_gallery": ExportConfig,
        "backfill": BackfillConfig,
        "choose_projection": FitConfig,
        "upgrade_report": UpgradeReportConfig,
        "quickstart": DemoConfig,
    }
    return known[recipe]


def command(path: Path) -> tuple[str, list[str]]:
    """The recipe that the first line of a config names, and its flags: one config or several, and others."""
    first = path.read_text(encoding="utf-8").splitlines()[0]
    found = re.fullmatch(r"# accelerate launch .*recipes/(\w+)\.py (--config \S+.*)", first)
    assert found, f"{path} does not open with the command that runs it"
    return found[1], found[2].split()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_config_parses_and_opens_with_its_command(path, monkeypatch):
    recipe, flags = command(path)
    assert str(path.relative_to(ROOT)) in flags
    assert (ROOT / "recipes" / f"{recipe}.py").is_file()
    monkeypatch.chdir(ROOT)
    parse_config(config_class(recipe), flags)


def test_every_recipe_has_a_config():
    recipes = {path.stem for path in (ROOT / "recipes").glob("*.py")}
    assert recipes == {command(path)[0] for path in CONFIGS}


@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.name)
def test_model_config_builds(path):
    encoder = OpenClipEncoder.create(read_model_config(str(path)))
    assert encoder.dim == read_model_config(str(path))["embed_dim"]


def test_published_pair_uses_quickgelu_for_openai_weights():
    config = parse_config(
        TextProjectionConfig, ["--config", str(ROOT / "recipes/configs/stage1_b32_l14.yaml")]
    )
    arch = config.old.removeprefix("open_clip:").split("/")[0]
    assert open_clip.get_model_config(arch)["quick_gelu"] is True
