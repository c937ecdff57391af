"""Regions: stretches of the graph around convolutions that run as one compiled program instead of node by node."""

from deepzero_core.perturb.regions.region import Entry, Region, entry_of, plan

__all__ = ["Entry", "Region", "entry_of", "plan"]
