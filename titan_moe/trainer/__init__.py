"""What surrounds torchtitan's trainer: the TOML config, text, checkpoints, metrics, and a CPU's gaps.

Importing it fills the gaps that torchtitan 0.3.0 has in this torch and on this device (``device.py``).
"""

from titan_moe.trainer.device import fill_gaps

fill_gaps()
