"""Stage: a trained network's answers on the test split."""

import torch
from prefect.states import State
from sklearn.metrics import confusion_matrix
from torch import nn
from torch.nn import functional as F

from configs.schema import Experiment
from deepzero_core.data import BatchSource
from tasks.problem import problem_of, test_batches
from tasks.records import Evaluated, Prepared, Trained
from tasks.stage import Stage, Tracking, perform, stage_task

BATCH = 500


@stage_task("evaluate")
def evaluate(
    tracking: Tracking, experiment: Experiment, prepared: Prepared, trained: Trained
) -> State[Evaluated] | Evaluated:
    """Accuracy, loss and confusion matrix of a trained network."""
    inputs = {
        "data": prepared,
        "limit": experiment.data.test_limit,
        "model": experiment.model,
        "weights": trained.weights_digest,
    }
    return perform(
        tracking,
        "evaluate",
        Evaluated,
        inputs,
        lambda stage: _evaluate(stage, experiment, prepared, trained),
        label=trained.method,
    )


def _evaluate(stage: Stage, experiment: Experiment, prepared: Prepared, trained: Trained) -> Evaluated:
    torch.set_num_threads(experiment.training.threads)
    module = trained_module(experiment, prepared, trained)
    accuracy, loss, predicted, labels = score(module, test_batches(experiment, prepared))
    classes = range(len(prepared.class_names))
    table = confusion_matrix(labels, predicted, labels=list(classes))
    stage.summarise(**{"test/accuracy": accuracy, "test/loss": loss})
    return Evaluated(accuracy=accuracy, loss=loss, confusion=tuple(tuple(int(n) for n in row) for row in table))


def trained_module(experiment: Experiment, prepared: Prepared, trained: Trained) -> nn.Module:
    """The network with its trained weights, in evaluation mode."""
    module = problem_of(experiment, prepared).build_module()
    module.load_state_dict(torch.load(trained.weights, weights_only=True))
    return module.eval()


def score(module: nn.Module, batches: BatchSource) -> tuple[float, float, list[int], list[int]]:
    """Accuracy, mean loss, predicted and true classes over a split; the module's mode is left as it was."""
    predicted: list[int] = []
    labels: list[int] = []
    loss = 0.0
    training = module.training
    module.eval()
    with torch.no_grad():
        for inputs, targets in batches.ordered(BATCH):
            outputs = module(inputs)
            loss += F.cross_entropy(outputs, targets, reduction="sum").item()
            predicted += outputs.argmax(1).tolist()
            labels += targets.tolist()
    module.train(training)
    correct = sum(p == t for p, t in zip(predicted, labels, strict=True))
    return correct / len(labels), loss / len(labels), predicted, labels
