"""Layer-wise pruning ratios that make a step of sparse estimation cost exactly as many queries as there are."""

from collections.abc import Mapping

from torch import Tensor, nn

from deepzero_core.errors import RequestError, suggest
from deepzero_core.estimators.cge import queries as spent
from deepzero_core.sparsity.masks import layer_ratios


def budget_ratios(
    scores: Mapping[str, Tensor], module: nn.Module, queries: int, *, difference: str = "forward"
) -> dict[str, float]:
    """A ratio for every trainable parameter: masks drawn from them leave the coordinates that the queries pay for.

    scores: of the maskable parameters; where the budget goes among them is decided by one global threshold, as in
    `layer_ratios`. The parameters without scores (biases, normalisation layers) are kept whole where they take at most
    half of the coordinates; else they have that half, each in proportion to its size.
    queries: of one step, the base one included: n coordinates cost n + 1 with the forward difference, 2n + 1 with the
    central one, whose odd query out is not spent. More than all coordinates cost: every ratio is zero.

    RequestError: a budget that does not pay for one coordinate, scores of a parameter that the module does not train.
    """
    each = spent(1, difference) - 1
    sizes = {name: value.numel() for name, value in module.named_parameters() if value.requires_grad}
    for name in scores:
        if name not in sizes:
            raise RequestError(f"{name!r} is not a trainable parameter of the module; {suggest(name, sizes)}")
    left = (queries - 1) // each
    if left < 1:
        raise RequestError(
            f"queries of a step must be at least {1 + each} for a {difference} difference, not {queries}"
        )
    left = min(left, sum(sizes.values()))
    unscored = {name: size for name, size in sizes.items() if name not in scores}
    scored = sum(sizes.values()) - sum(unscored.values())
    always = min(sum(unscored.values()), max(left // 2, left - scored))
    kept = _in_proportion(unscored, always)
    ratios = {name: 1 - kept[name] / size for name, size in unscored.items()}
    if scores:
        ratios |= layer_ratios(scores, 1 - (left - always) / scored)
    return ratios


def _in_proportion(sizes: Mapping[str, int], total: int) -> dict[str, int]:
    """Whole numbers that sum to `total` and never exceed the sizes they are in proportion to."""
    kept, left, rest = {}, total, sum(sizes.values())
    for name, size in sizes.items():
        kept[name] = round(left * size / rest)
        left, rest = left - kept[name], rest - size
    return kept
