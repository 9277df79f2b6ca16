"""What a run will hold and send, before it is paid for: ``python -m titan_moe plan``. docs/scale.md."""
