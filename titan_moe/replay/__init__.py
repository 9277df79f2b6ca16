"""Routes that are recorded, replayed and pinned; ids are found by key. docs/replay.md."""
