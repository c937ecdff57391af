"""Solvers that networks are coupled to: PhiFlow's wake flow and Burgers' equation, external programs, functions.

from simulators.wake import Wake
from simulators.burgers import Burgers
from simulators.external import ExternalProgram
from simulators.function import FunctionSimulator
from simulators.methods import Loop, Windows, ZerothOrderLoop
"""
