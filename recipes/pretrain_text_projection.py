"""Stage 1: pretrain the projection from the new space to the old one on text alone.

    accelerate launch recipes/pretrain_text_projection.py --config recipes/configs/stage1_b32_l14.yaml

Any key of the config can be given as a flag, nested ones with dots (--training.lr 0.0005). Several processes
split each batch and share their negatives. A killed run continues with the same command.

Not supported: gradient accumulation (it would change the contrastive loss), FSDP.
"""

from xbt.config import run_recipe
from xbt.training import TextProjectionConfig, pretrain_text_projection

if __name__ == "__main__":
    run_recipe(pretrain_text_projection, TextProjectionConfig)
