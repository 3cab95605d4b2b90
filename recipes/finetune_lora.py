"""Stage 2: fine-tune the new CLIP with LoRA on image–text pairs, behind stage 1's projection.

    accelerate launch recipes/finetune_lora.py --config recipes/configs/stage2_b32_l14.yaml

The old model is not loaded. Any key of the config can be given as a flag, nested ones with dots
(--lora.rank 16). A killed run continues with the same command.

Not supported: gradient accumulation (it would change the contrastive loss), FSDP.
"""

from xbt.config import run_recipe
from xbt.training import LoraFinetuningConfig, finetune_lora

if __name__ == "__main__":
    run_recipe(finetune_lora, LoraFinetuningConfig)
