"""Does bf16 change what is learnt? ``python benchmarks/bf16_curve.py [--json FILE]``.

RC-MAE on the embedded digits, a model wide enough for ``precision=auto`` to choose bf16, three
seeds each way. Prints the mean loss of every epoch and the kNN accuracy at the end; what bf16
changes must be small beside what the seed changes. About five minutes on 2 cores.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is imported

import argparse
import json
import time
from pathlib import Path

import torch

from fastmim import RCMAE, create_model
from fastmim.data import Augmentation, PretrainLoader, eval_batches, open_source
from fastmim.eval import extract_features, knn_accuracy
from fastmim.train import Engine, Recipe

SIZE = dict(embed_dim=384, num_heads=6, depth=6)  # vit_micro_patch8 in the width of ViT-S
EPOCHS = 12


def train(seed: int, precision: str) -> dict:
    """One run: its losses by epoch, kNN accuracy of the teacher, and duration."""
    source = open_source("digits")
    recipe = Recipe(
        model="rc_vit_micro_patch8",
        epochs=EPOCHS,
        warmup_epochs=1,
        batch_size=64,
        base_lr=2e-3,
        momentum=0.95,
        seed=seed,
    )
    torch.manual_seed(seed)
    model = create_model(
        recipe.model,
        in_chans=source.channels,
        norm_pix_loss=True,
        pixel_mean=source.mean,
        pixel_std=source.std,
        **SIZE,
    )
    method = RCMAE(model, momentum=recipe.momentum)
    loader = PretrainLoader(
        source,
        batch_size=recipe.batch_size,
        image_size=model.patch_embed.img_size,
        seed=seed,
        augmentation=Augmentation(scale=(0.8, 1.0), hflip=0.0),
    )
    steps = loader.sampler.steps_per_epoch
    engine = Engine(method, recipe, precision=precision, steps_per_epoch=steps)
    begin = time.perf_counter()
    losses = [
        engine.run_step(step, [batch]).losses["loss"]
        for step, batch in zip(range(engine.total_steps), loader, strict=False)
    ]
    seconds = time.perf_counter() - begin
    batches = eval_batches(
        source, image_size=model.patch_embed.img_size, batch_size=256, crop_ratio=1.0
    )
    return {
        "seed": seed,
        "precision": precision,
        "loss_by_epoch": [
            round(sum(losses[i : i + steps]) / steps, 5) for i in range(0, len(losses), steps)
        ],
        "knn_accuracy": round(knn_accuracy(extract_features(method.teacher.module, batches)), 4),
        "images_per_second": round(len(losses) * recipe.batch_size / seconds, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="append the rows to this file")
    options = parser.parse_args()
    for seed in range(3):
        for precision in ("fp32", "bf16"):
            row = {"torch": torch.__version__, **train(seed, precision)}
            print(json.dumps(row), flush=True)
            if options.json:
                with options.json.open("a") as file:
                    file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
