"""BCT, BT² and OCA on CLIP upgrades: the demo's two CLIPs per seed, beside the two stages of XBT."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from xbt.config import parse_config
from xbt.data import PairSource
from xbt.demo import DemoConfig, run_demo
from xbt.evaluation.job import EvaluationConfig, run_evaluation
from xbt.training import CompatibleClipConfig, TrainArgs, train_compatible_clip

METHODS = ("bct", "bt2", "oca")
NAMES = {"bct": "BCT", "bt2": "BT²", "oca": "OCA"}

_PAIRS = 300_000
"""Offset of the demo's seed for the pairs of stage 2."""


@dataclass
class ClipsConfig:
    """Two CLIPs on the built-in scenes per seed."""

    seeds: list[int] = field(default_factory=lambda: [3, 4, 5])
    """One pair of CLIPs per seed; an empty list leaves them out."""
    runs_dir: str = "runs/benchmarks/upgrade_scenes"
    """Where the CLIPs and XBT's stages are trained, as upgrade_scenes.py does; what is there is used."""
    training: TrainArgs = field(
        default_factory=lambda: TrainArgs(
            steps=120, batch_size=128, lr=3e-4, warmup_steps=10, eval_every=20, checkpoint_every=60
        )
    )
    """Training settings of the heads and LoRA, on the pairs of XBT's stage 2."""


def clip_cells(config: ClipsConfig, seed: int) -> dict[str, dict[str, float]]:
    """R@1 per cell and direction on scenes that nobody has trained on."""
    demo = parse_config(DemoConfig, ["--config", "recipes/configs/quickstart.yaml"])
    out = f"{config.runs_dir}/seed_{seed}"
    demo = replace(demo, seed=seed, output_dir=out)
    run_demo(demo)
    old, new = (f"open_clip:local-dir:{out}/{side}/model" for side in ("old", "new"))
    for method in METHODS:
        train_compatible_clip(
            CompatibleClipConfig(
                old=old,
                new=new,
                pairs=PairSource("scenes", limit=demo.pairs, seed=seed + _PAIRS),
                output_dir=f"{out}/{method}",
                method=method,
                training=replace(config.training, seed=seed),
            )
        )
    report = run_evaluation(
        EvaluationConfig(
            old=old,
            new=new,
            pairs=PairSource("scenes", split="test", limit=demo.test_scenes, seed=seed),
            output_dir=f"{out}/compatible_evaluation",
            upgraded={
                "XBT, stage 1": f"{out}/stage1/projection",
                "XBT, stage 1+2": f"{out}/stage2/compatible",
                **{NAMES[method]: f"{out}/{method}/compatible" for method in METHODS},
            },
            own={NAMES[method]: f"{out}/{method}/full" for method in METHODS},
        )
    )
    return {cell.name: {"T2I R@1": cell.t2i[1], "I2T R@1": cell.i2t[1]} for cell in report.cells}
