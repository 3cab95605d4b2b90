"""Train a CLIP from scratch on image–text pairs, with any open_clip model config.

    accelerate launch recipes/train_clip.py --config recipes/configs/clip_scenes_old.yaml

Any key of the config can be given as a flag, nested ones with dots (--training.steps 200). A killed run
continues when the same command is given again.

Not supported: image augmentation, gradient accumulation, FSDP. For serious pretraining use open_clip itself;
this recipe makes the small models that the demo and the tests upgrade from and to.
"""

from xbt.config import run_recipe
from xbt.training import ClipConfig, train_clip

if __name__ == "__main__":
    run_recipe(train_clip, ClipConfig)
