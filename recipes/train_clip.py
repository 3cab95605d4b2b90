"""Train a CLIP from scratch on image–text pairs, with any open_clip model config.

    accelerate launch recipes/train_clip.py --config recipes/configs/clip_scenes_old.yaml

Any key of the config can be given as a flag, nested ones with dots (--training.steps 200). A killed run
continues with the same command.

Not supported: image augmentation, gradient accumulation, FSDP. For serious pretraining use open_clip itself;
this recipe makes the small models of the demo and the tests.
"""

from xbt.config import run_recipe
from xbt.training import ClipConfig, train_clip

if __name__ == "__main__":
    run_recipe(train_clip, ClipConfig)
