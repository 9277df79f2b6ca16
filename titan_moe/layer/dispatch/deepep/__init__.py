"""DeepEP's way to dispatch: one row per token and rank, on plain collectives or on the DeepEP library."""
