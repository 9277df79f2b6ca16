"""How a layer knows that activation checkpointing runs its forward again."""

import torch


def is_recomputing() -> bool:
    """Whether autograd runs this forward again for a backward; its task id is -1 while no backward runs."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
