"""Training on gradient graphs: losses against a teacher, samples, optimizers, the loop."""

from graphopt.training.examples import Examples, gather
from graphopt.training.loop import Schedule, Trained, train
from graphopt.training.losses import Objective, Pair
from graphopt.training.optimizers import Variable

__all__ = ["Examples", "Objective", "Pair", "Schedule", "Trained", "Variable", "gather", "train"]
