"""What surrounds torchtitan's trainer: the TOML config, text, checkpoints, metrics, and a CPU's gaps."""
