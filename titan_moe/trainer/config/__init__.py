"""One TOML file plus a command line, checked before anything starts. The page is docs/config.md."""

from titan_moe.trainer.config.errors import ConfigError
from titan_moe.trainer.config.job import Job, load, write_resolved

__all__ = ["ConfigError", "Job", "load", "write_resolved"]
