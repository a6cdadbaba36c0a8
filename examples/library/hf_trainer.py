"""Hugging Face's Trainer on several processes, with the sigmoid loss over the global batch.

    torchrun --nproc-per-node 2 examples/library/hf_trainer.py FOLDER

The loss of `SiglipModel` itself knows the pairs of one process only. FOLDER receives the Trainer's files.
Where torch-xla is installed beside, accelerate prefers it: USE_TORCH_XLA=0.
"""

import os
import sys
from typing import Any

import torch
from transformers import SiglipConfig, SiglipModel, Trainer, TrainingArguments

import sigray

BATCH, STEPS = 16, 5
SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION = {**SHAPE, "image_size": 16, "patch_size": 8}
TEXT = {**SHAPE, "vocab_size": 100, "max_position_embeddings": 8, "projection_size": 32}
TEXT |= {"bos_token_id": 1, "eos_token_id": 2}


class SigmoidTrainer(Trainer):
    """The gradients are those of the global batch: DistributedDataParallel averages them over the processes."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
        outputs = model(**inputs)
        own = self.accelerator.unwrap_model(model)
        scale, bias = own.logit_scale.exp().squeeze(), own.logit_bias.squeeze()
        loss = sigray.ring_sigmoid_loss(outputs.image_embeds, outputs.text_embeds, scale, bias)
        return (loss, outputs) if return_outputs else loss


def main(folder: str) -> None:
    torch.manual_seed(0)
    model = SiglipModel(SiglipConfig(text_config=TEXT, vision_config=VISION))
    pairs = [
        {"pixel_values": torch.randn(3, 16, 16), "input_ids": torch.randint(100, (8,))} for _ in range(BATCH * STEPS)
    ]
    arguments = TrainingArguments(
        folder,
        use_cpu=True,
        ddp_backend="gloo",
        per_device_train_batch_size=BATCH // int(os.environ["WORLD_SIZE"]),  # torchrun's
        num_train_epochs=1,
        learning_rate=1e-3,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    SigmoidTrainer(model, arguments, train_dataset=pairs).train()


if __name__ == "__main__":
    main(sys.argv[1])
