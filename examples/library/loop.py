"""The sigmoid loss over the global batch, in a training loop of your own.

    torchrun --nproc-per-node 2 examples/library/loop.py ddp     (or: all_reduce, micro_batches, fsdp2)

Every way prints the same losses, with any number of processes that divides the batch of 16.
"""

import sys

import open_clip
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import sigray

BATCH, STEPS = 16, 5
VISION = {"image_size": 16, "patch_size": 8, "width": 32, "head_width": 16, "layers": 1}
TEXT = {"context_length": 8, "vocab_size": 100, "width": 32, "heads": 2, "layers": 1}


def main(how: str) -> None:
    dist.init_process_group("gloo")  # "nccl" on GPUs
    torch.manual_seed(0)  # the same weights and data on every rank; a real loop reads its own rows
    model = open_clip.CustomTextCLIP(32, VISION, TEXT, init_logit_bias=-10.0)
    images, texts = torch.randn(BATCH, 3, 16, 16), torch.randint(100, (BATCH, 8))
    size = BATCH // dist.get_world_size()
    images, texts = (rows[dist.get_rank() * size :][:size] for rows in (images, texts))
    run = model
    if how == "ddp":  # averages gradients itself
        run = DistributedDataParallel(model)
    elif how == "fsdp2":  # averages those of split weights itself; scalars cannot be split
        fully_shard(model, ignored_params={model.logit_scale, model.logit_bias})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(STEPS):
        optimizer.zero_grad()
        if how == "micro_batches":  # GradCache: the memory of two pairs, the loss of all

            def features(rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
                return model(images[rows], texts[rows])[:2]

            def loss_of(image: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
                return sigray.ring_sigmoid_loss(image, text, model.logit_scale.exp(), model.logit_bias)

            loss = sigray.cached_backward(features, loss_of, num_rows=size, micro_batch_size=2)
        else:
            loss = sigray.ring_sigmoid_loss(*run(images, texts))
            loss.backward()
        if how != "ddp":
            sigray.all_reduce_gradients(model)
        optimizer.step()
        mean = loss.detach().clone()
        dist.all_reduce(mean)  # the loss of the global batch is the mean over ranks
        if dist.get_rank() == 0:
            print(f"step {step} loss {mean.item() / dist.get_world_size():.5f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
