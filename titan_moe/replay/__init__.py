"""ReplaySession that are recorded, replayed and pinned, addressed by key. docs/replay.md."""
