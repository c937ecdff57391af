"""Stage: train what stands in front of the classifier, and share out the queries of sparse estimation over it."""

import time
from typing import Any

import numpy as np
import torch
from prefect.states import State
from torch import nn

from configs.defence import Defence
from deepzero_core.data import ImageStore, Split, to_tensor
from deepzero_core.models import Autoencoder, build_denoiser
from deepzero_core.oracle import Metered, as_layer
from deepzero_core.smoothing import relabelled
from deepzero_core.smoothing.methods import (
    DeepZeroDS,
    DeepZeroSplit,
    Estimator,
    FirstOrderDS,
    ZerothOrderAEDS,
    ZerothOrderDS,
    denoiser_and_encoder,
    denoiser_scores,
)
from deepzero_core.training import GradientSource, Schedule, Trainer, TrainingSettings
from deepzero_core.training.sources import step_generator
from infra.classifiers import purifying
from infra.victims import open_victim, white_box
from tasks.loop import Loop
from tasks.pretrain import image_batches
from tasks.problem import limited, network_of
from tasks.records import Defended, Prepared, Pretrained, Shares, Victim
from tasks.shares import shares_of
from tasks.stage import Stage, Tracking, perform, save_tensors, stage_task
from tasks.train import digest
from tasks.victim import victim_of

_SCORES = 4


@stage_task("share out")
def share_out(
    tracking: Tracking, defence: Defence, prepared: Prepared, victim: Victim, denoiser: Pretrained, seed: int
) -> State[Shares] | Shares:
    """Layer-wise ratios of the pre-trained denoiser that make a step of sparse estimation cost its queries exactly."""
    inputs = {
        "data": prepared,
        "limit": defence.data.train_limit,
        "victim": victim.fingerprint,
        "denoiser": denoiser.weights_digest,
        "network": network_of(defence, prepared, "denoiser", seed),
        "pruning": defence.pruning.model_dump(exclude={"redraw_epochs"}),
        "queries": defence.training.queries,
        "sigma": defence.certification.sigma,
        "seed": seed,
        "threads": defence.training.threads,
    }
    return perform(
        tracking,
        "share-out",
        Shares,
        inputs,
        lambda stage: _share_out(stage, defence, prepared, victim, denoiser, seed),
        label=f"seed {seed}",
    )


def _share_out(
    stage: Stage, defence: Defence, prepared: Prepared, victim: Victim, denoiser: Pretrained, seed: int
) -> Shares:
    torch.set_num_threads(defence.training.threads)
    started, pruning = time.perf_counter(), defence.pruning
    module = build_denoiser(**network_of(defence, prepared, "denoiser", seed))
    module.load_state_dict(torch.load(denoiser.weights, weights_only=True))
    scores, queries = {}, 0
    if pruning.method == "zo-grasp":
        split = limited(_labelled(defence, prepared, victim), pruning.examples)
        with open_victim(victim_of(defence, victim)) as box:
            scores = denoiser_scores(
                module.train(),
                as_layer(box),
                to_tensor(split.images),
                torch.from_numpy(np.array(split.labels)),
                sigma=defence.certification.sigma,
                seed=seed,
                queries=pruning.queries,
                mu=pruning.mu,
                generator=step_generator(seed, _SCORES),
            )
        queries = 2 * (1 + pruning.queries)
    budget = defence.training.queries
    return shares_of(stage, scores, module, budget, seed=seed, queries=queries, started=started)


@stage_task("defend")
def defend(
    tracking: Tracking,
    defence: Defence,
    prepared: Prepared,
    victim: Victim,
    method: str,
    seed: int,
    *,
    denoiser: Pretrained,
    autoencoder: Pretrained | None = None,
    shares: Shares | None = None,
) -> State[Defended] | Defended:
    """Train the pre-trained denoiser for the classifier's sake with `method`, one of `configs.defence`."""
    training = defence.training
    inputs = {
        "data": prepared,
        "limit": defence.data.train_limit,
        "batch_size": defence.data.batch_size,
        "victim": victim.fingerprint,
        "denoiser": denoiser.weights_digest,
        "autoencoder": autoencoder and autoencoder.weights_digest,
        "network": network_of(defence, prepared, "denoiser", seed),
        "shares": shares and shares.ratios,
        "redraw_epochs": defence.pruning.redraw_epochs,
        "training": training.model_dump(exclude={"method", "checkpoint_every", "lr"}),
        "lr": _peak(defence, method),
        "sigma": defence.certification.sigma,
        "method": method,
        "seed": seed,
    }
    return perform(
        tracking,
        "defend",
        Defended,
        inputs,
        lambda stage: _defend(stage, defence, prepared, victim, method, seed, denoiser, autoencoder, shares),
        label=f"{method}, seed {seed}",
    )


def undefended(seed: int) -> Defended:
    """The method "none": nothing is trained, and nothing stands in front of the classifier."""
    return Defended(
        method="none",
        seed=seed,
        folder=".",
        history=None,
        weights=None,
        weights_digest="",
        purifier=None,
        steps=0,
        queries=0,
        asked=0,
        seconds=0.0,
    )


def _defend(
    stage: Stage,
    defence: Defence,
    prepared: Prepared,
    victim: Victim,
    method: str,
    seed: int,
    denoiser: Pretrained,
    autoencoder: Pretrained | None,
    shares: Shares | None,
) -> Defended:
    torch.set_num_threads(defence.training.threads)
    purifier = _purifier(defence, prepared, seed, with_autoencoder=autoencoder is not None)
    network = purifying(purifier)
    for part, pretrained in zip(network, (denoiser, autoencoder), strict=False):
        assert pretrained is not None
        part.load_state_dict(torch.load(pretrained.weights, weights_only=True))
    batches = image_batches(_labelled(defence, prepared, victim), defence, seed)
    with open_victim(victim_of(defence, victim)) as box:
        source = _source(defence, prepared, victim, method, seed, network, box)
        trainer = Trainer(_trained_part(network), batches, source, _settings(defence, method, seed, shares))
        loop = Loop(stage, trainer, defence.training.checkpoint_every)
        loop.run()
        spent = box.statistics
    weights = stage.folder / "weights.pt"
    save_tensors(weights, network.state_dict())
    stage.run.artifact(weights, "model")
    # By its queries, and not by the account, which a killed run has charged for steps that were done again.
    asked = 0 if method == "fo-ds" else trainer.queries * defence.data.batch_size
    costs = {"steps": trainer.step, "queries": trainer.queries, "images_asked": asked, "seconds": loop.clock.seconds}
    stage.summarise(**{f"cost/{name}": value for name, value in costs.items()})
    if spent.cost is not None:
        stage.summarise(**{"cost/spent_on_account": spent.cost})
    return Defended(
        method=method,
        seed=seed,
        folder=stage.folder,
        history=stage.folder / "history.jsonl",
        weights=weights,
        weights_digest=digest(network),
        purifier=purifier,
        steps=trainer.step,
        queries=trainer.queries,
        asked=asked,
        seconds=loop.clock.seconds,
    )


def _purifier(defence: Defence, prepared: Prepared, seed: int, *, with_autoencoder: bool) -> dict[str, Any]:
    behind = network_of(defence, prepared, "autoencoder", seed) if with_autoencoder else None
    return {"denoiser": network_of(defence, prepared, "denoiser", seed), "autoencoder": behind}


def _trained_part(network: nn.Sequential) -> nn.Module:
    """The denoiser and, where there is an autoencoder, its encoder: the decoder stays as it is."""
    if len(network) == 1:
        return network[0]
    autoencoder = network[1]
    assert isinstance(autoencoder, Autoencoder)
    return denoiser_and_encoder(network[0], autoencoder)


def _labelled(defence: Defence, prepared: Prepared, victim: Victim) -> Split:
    """The training images with the classifier's own answers for labels."""
    split = limited(ImageStore.open(prepared.store).split("train"), defence.data.train_limit)
    return relabelled(split, torch.from_numpy(np.load(victim.labels)))


def _peak(defence: Defence, method: str) -> float:
    return dict(defence.training.lr).get(method, defence.training.optimizer.lr)


def _settings(defence: Defence, method: str, seed: int, shares: Shares | None) -> TrainingSettings:
    training = defence.training
    return TrainingSettings(
        steps=training.steps,
        schedule=Schedule(_peak(defence, method), training.steps, 0, training.schedule.name),
        seed=seed,
        optimizer=training.optimizer.name,
        optimizer_arguments=training.optimizer.arguments,
        ratios=None if shares is None else shares.ratios,
        redraw_epochs=defence.pruning.redraw_epochs,
    )


def _source(
    defence: Defence,
    prepared: Prepared,
    victim: Victim,
    method: str,
    seed: int,
    network: nn.Sequential,
    box: Metered,
) -> GradientSource:
    """Where the method's gradients come from."""
    training, sigma = defence.training, defence.certification.sigma
    common: dict[str, Any] = {"sigma": sigma, "seed": seed, "reconstruction": training.reconstruction}
    if method == "fo-ds":
        return FirstOrderDS(white_box(victim_of(defence, victim)), **common)
    layer, step = as_layer(box), {} if training.mu is None else {"mu": training.mu}
    if method == "zo-ds":
        estimator = Estimator("rge", training.queries, **step)
        return ZerothOrderDS(layer, prepared.image_shape, estimator=estimator, **common)
    if method == "zo-ae-ds":
        autoencoder = network[1]
        assert isinstance(autoencoder, Autoencoder)
        estimator = Estimator(training.latent_estimator, training.queries, **step)
        latent = defence.denoiser.latent
        return ZerothOrderAEDS(layer, autoencoder.decoder.eval(), latent, estimator=estimator, **common)
    if method == "deepzero-split":
        return DeepZeroSplit(layer, prepared.image_shape, queries=training.queries, **step, **common)
    return DeepZeroDS(layer, **step, **common)
