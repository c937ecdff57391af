"""The perturbation engine: exact finite differences of a module, many coordinates at once."""

from deepzero_core.perturb.evaluator import BasePass, Chunk, Evaluator, prepare

__all__ = ["BasePass", "Chunk", "Evaluator", "prepare"]
