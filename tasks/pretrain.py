"""Stage: a denoiser learns to take noise away, or an autoencoder to give an image back. No query is spent."""

import torch
from prefect.states import State

from configs.defence import Defence
from deepzero_core.data import BatchSource, ImageStore, Split
from deepzero_core.models import build_denoiser
from deepzero_core.smoothing.methods import Pretraining
from deepzero_core.training import Schedule, Trainer, TrainingSettings
from tasks.history import read
from tasks.loop import Loop
from tasks.problem import Network, limited, network_of
from tasks.records import Prepared, Pretrained
from tasks.stage import Stage, Tracking, perform, save_tensors, stage_task
from tasks.train import digest

_LAST_STEPS = 20


@stage_task("pretrain")
def pretrain(
    tracking: Tracking, defence: Defence, prepared: Prepared, network: Network, seed: int
) -> State[Pretrained] | Pretrained:
    """Mean squared error on noisy images for the denoiser, on clean ones for the autoencoder; by backpropagation."""
    inputs = {
        "data": prepared,
        "limit": defence.data.train_limit,
        "batch_size": defence.data.batch_size,
        "network": network_of(defence, prepared, network, seed),
        "pretraining": defence.pretraining,
        "sigma": defence.certification.sigma if network == "denoiser" else 0.0,
        "seed": seed,
        "threads": defence.training.threads,
    }
    return perform(
        tracking,
        "pretrain",
        Pretrained,
        inputs,
        lambda stage: _pretrain(stage, defence, prepared, network, seed),
        label=f"{network}, seed {seed}",
    )


def _pretrain(stage: Stage, defence: Defence, prepared: Prepared, network: Network, seed: int) -> Pretrained:
    torch.set_num_threads(defence.training.threads)
    module = build_denoiser(**network_of(defence, prepared, network, seed))
    split = limited(ImageStore.open(prepared.store).split("train"), defence.data.train_limit)
    settings = defence.pretraining
    plan = TrainingSettings(
        steps=settings.steps,
        schedule=Schedule(settings.lr, settings.steps),
        seed=seed,
        optimizer="Adam",
        optimizer_arguments={},
    )
    source = Pretraining(defence.certification.sigma if network == "denoiser" else 0.0, seed)
    loop = Loop(stage, Trainer(module, image_batches(split, defence, seed), source, plan), checkpoint_every=500)
    loop.run()
    weights = stage.folder / "weights.pt"
    save_tensors(weights, module.state_dict())
    stage.run.artifact(weights, "model")
    losses = [line["loss"] for line in read(stage.folder / "history.jsonl")][-_LAST_STEPS:]
    loss = sum(losses) / len(losses)
    stage.summarise(**{"cost/seconds": loop.clock.seconds, "pretraining/loss": loss})
    return Pretrained(
        network=network,
        folder=stage.folder,
        history=stage.folder / "history.jsonl",
        weights=weights,
        weights_digest=digest(module),
        parameters=sum(p.numel() for p in module.parameters()),
        loss=loss,
        seconds=loop.clock.seconds,
    )


def image_batches(split: Split, defence: Defence, seed: int) -> BatchSource:
    """Batches of images in [0, 1], as they are."""
    channels = split.images.shape[1]
    return BatchSource(
        split, batch_size=defence.data.batch_size, seed=seed, mean=(0.0,) * channels, std=(1.0,) * channels
    )
