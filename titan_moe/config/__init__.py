"""One TOML file plus a command line, checked before anything starts. The page is docs/config.md."""

from titan_moe.config.errors import ConfigError
from titan_moe.config.job import Job, load, write_resolved

__all__ = ["ConfigError", "Job", "load", "write_resolved"]
