"""Programs to copy: solvers that deepzero can ask (`simulators.external`)."""
