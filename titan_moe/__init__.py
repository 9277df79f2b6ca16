"""titan_moe: the Mixture-of-Experts component for TorchTitan, right on every mesh and every shape."""

from titan_moe.trainer.device import fill_gaps

fill_gaps()

__version__ = "0.1.0"
