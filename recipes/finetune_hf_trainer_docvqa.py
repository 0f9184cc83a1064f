"""Fine-tune Phi-3-vision or Phi-3.5-vision with the published script's flags; see docs/recipes.md.

python recipes/finetune_hf_trainer_docvqa.py --help
torchrun --nproc_per_node=4 recipes/finetune_hf_trainer_docvqa.py --bf16
"""

import sys

from phi3v.recipes import DOCVQA, run_recipe

if __name__ == "__main__":
    sys.exit(run_recipe(DOCVQA))
