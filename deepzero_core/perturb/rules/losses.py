"""Losses of an error e = y − t between prediction and target, c = clamp(e, −β, β); t unchanged.

squared error:      Δe² = (2e + δ)·δ
Huber:              f = c·(e − c/2),     Δf = Δc·(e − c/2) + (c + Δc)·(δ − Δc/2)
smooth L1:          Huber's f divided by β
then the mean or the sum, as the loss asks for
"""

from dataclasses import replace

import torch

from deepzero_core.perturb.changes import Change, dense
from deepzero_core.perturb.rules.piecewise import clamped
from deepzero_core.perturb.rules.registry import Call, Result, only_change, rule

aten = torch.ops.aten


@rule(aten.mse_loss.default)
def squared_error(call: Call) -> Result:
    change = _of_prediction(call)
    if change is None:
        return None
    error = call.on_block(change, "error", lambda: call.args[0] - call.args[1])
    return _reduced(call, Change(torch.add(change.delta, error, alpha=2) * change.delta))


@rule(aten.huber_loss.default, aten.smooth_l1_loss.default)
def huber(call: Call) -> Result:
    change, beta = _of_prediction(call), call.argument(3, 1.0)
    if change is None or beta <= 0:
        return None
    error = call.once("error", lambda: call.args[0] - call.args[1])
    moved = clamped(replace(call, args=(error,)), change, -beta, beta)
    near = call.once("clamped", lambda: error.clamp(-beta, beta))
    delta = moved * (error - near / 2) + (near + moved) * (change.delta - moved / 2)
    return _reduced(call, Change(delta if call.target is aten.huber_loss.default else delta / beta))


def _of_prediction(call: Call) -> Change | None:
    """The whole change of y where t stays and has its shape."""
    change = only_change(call)
    if change is None or call.args[0].shape != call.args[1].shape:
        return None
    return Change(dense(change, call.args[0].shape))


def _reduced(call: Call, change: Change) -> Change:
    delta = change.delta
    axes = list(range(1, delta.ndim))
    match call.argument(2, 1):
        case 0:
            return change
        case 1:
            return Change(delta.mean(axes) if axes else delta)
        case _:
            return Change(delta.sum(axes) if axes else delta)
