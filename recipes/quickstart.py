"""A full upgrade on the built-in scenes, in minutes on a CPU; `make demo` runs it.

    accelerate launch --num_processes 1 recipes/quickstart.py --config recipes/configs/quickstart.yaml

It trains an old CLIP, which embeds a gallery, and a better new one. Stage 1 fits the projection on captions
only, and stage 2 fine-tunes with LoRA on a few pairs. A table and two figures show the retrieval of the new
CLIP in the old gallery, on scenes that are not in the training data.

Not supported: several processes.
"""

from xbt.config import run_recipe
from xbt.demo import DemoConfig, run_demo

if __name__ == "__main__":
    run_recipe(run_demo, DemoConfig)
