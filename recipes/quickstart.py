"""The whole path on the built-in scenes, in minutes on a CPU; this is what `make demo` runs.

    accelerate launch --num_processes 1 recipes/quickstart.py --config recipes/configs/quickstart.yaml

An old CLIP is trained and embeds a gallery; a better one is trained; stage 1 fits the projection on captions
alone; stage 2 fine-tunes with LoRA on a few pairs. The table that it ends with shows, on scenes that no model
was trained on, what the new CLIP finds in the old gallery; the pictures show it.

Not supported: several processes.
"""

from xbt.config import run_recipe
from xbt.demo import DemoConfig, run_demo

if __name__ == "__main__":
    run_recipe(run_demo, DemoConfig)
