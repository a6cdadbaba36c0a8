"""A TorchTrainer of your own: the exact stream, the loss over all workers, resume on any number of workers.

cd examples/ray; python torch_trainer.py --shards ../../data/emoji36/train --storage /tmp/own --workers 2
"""

import argparse
import tempfile
from pathlib import Path

import open_clip
import ray
import torch
from ray.train.torch import TorchTrainer

import sigray
from losses import pair_loss

VISION = {"image_size": 16, "patch_size": 8, "width": 32, "head_width": 16, "layers": 1}
TEXT = {"context_length": 8, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
TOWERS = {"embed_dim": 32, "vision_cfg": VISION, "text_cfg": TEXT}


def train(options: dict) -> None:
    torch.manual_seed(0)
    model = open_clip.CustomTextCLIP(32, VISION, TEXT, init_logit_bias=-10.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    saved = {"stream": None}
    if checkpoint := ray.train.get_checkpoint():
        with checkpoint.as_directory() as folder:
            saved = torch.load(Path(folder, "saved.pt"))
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
    data = {"num_samples": options["samples"], "state": saved["stream"], "num_workers": 2, "model": {"towers": TOWERS}}
    with sigray.stream(options["shards"], global_batch_size=64, **data) as stream:
        for step, batch in enumerate(stream, start=stream.state_dict()["samples_seen"] // 64 + 1):
            loss = pair_loss(model, batch)
            optimizer.zero_grad()
            loss.backward()
            sigray.all_reduce_gradients(model)
            optimizer.step()
            if step % 5 == 0:
                parts = {"model": model, "optimizer": optimizer, "stream": stream}
                with tempfile.TemporaryDirectory() as folder:
                    torch.save({name: part.state_dict() for name, part in parts.items()}, Path(folder, "saved.pt"))
                    is_first = ray.train.get_context().get_world_rank() == 0
                    checkpoint = ray.train.Checkpoint.from_directory(folder) if is_first else None
                    ray.train.report({"step": step, "loss_of_this_rank": loss.item()}, checkpoint)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", required=True)
    parser.add_argument("--storage", required=True)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--samples", type=int, default=64 * 20)
    options = parser.parse_args()
    ray.init(runtime_env={"working_dir": str(Path(__file__).parent)})
    scaling = ray.train.ScalingConfig(num_workers=options.workers, resources_per_worker={"CPU": 0.5})
    run = ray.train.RunConfig("own", options.storage, failure_config=ray.train.FailureConfig(max_failures=3))
    print(TorchTrainer(train, train_loop_config=vars(options), scaling_config=scaling, run_config=run).fit().metrics)
