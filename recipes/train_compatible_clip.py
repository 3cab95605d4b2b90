"""Fine-tune a new CLIP that serves the old gallery and its own: BCT, BT² and OCA on image–text pairs.

    accelerate launch recipes/train_compatible_clip.py --config recipes/configs/compatible_clip_scenes.yaml

Both models are loaded; the old one embeds the pairs and is then released. Any key of the config can be given
as a flag, nested ones with dots (--lora.rank 16). A killed run continues with the same command.

Not supported: gradient accumulation (it would change the contrastive losses), FSDP, training without LoRA.
"""

from xbt.config import run_recipe
from xbt.training import CompatibleClipConfig, train_compatible_clip

if __name__ == "__main__":
    run_recipe(train_compatible_clip, CompatibleClipConfig)
