"""Two real processes: each has statistics of its own share of the data, and all end with the main one's."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
SCRIPT = """
import sys, torch
from torch import nn
from xbt.run_dir import RunDirectory
from xbt.training import TrainArgs
from xbt.training.loop import TrainingLoop, make_accelerator

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.out = nn.BatchNorm1d(3), nn.Linear(3, 1)
    def forward(self, batch):
        return self.out(self.norm(batch["x"])).square().mean(), {}

class Data:
    def __len__(self):
        return 16
    def __getitems__(self, draws):
        return {"x": torch.tensor([[float(d.item), d.item ** 2.0, -d.item] for d in draws])}

def mean():
    seen.append(net.norm.running_mean.tolist())
    return {"score": float(len(seen))}

seen = []
args = TrainArgs(steps=3, batch_size=8, eval_every=1, warmup_steps=0, checkpoint_every=0)
run = RunDirectory(sys.argv[1], args)
accelerator = make_accelerator(args, run, args, "test")
net = Net()
TrainingLoop(accelerator, run, args, net, Data(), evaluate=mean if sys.argv[2] == "scored" else None).fit()
line = f"RANK {accelerator.process_index} {seen} {net.norm.running_mean.tolist()}"
print(line, flush=True)
"""

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("kind", ["scored", "not_scored"])
def test_processes_evaluate_and_end_with_the_same_statistics(tmp_path, kind):
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(tmp_path / "script.py"), str(tmp_path / "run"), kind]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    said = [line.split(" ", 2)[2] for line in done.stdout.splitlines() if line.startswith("RANK")]
    assert len(said) == 2
    assert said[0] == said[1]
    assert "[0.0, 0.0, 0.0]" not in said[0].rpartition("]] ")[2]
