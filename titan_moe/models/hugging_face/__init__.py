"""Hugging Face's format, both ways: adapters for training, config.json, export. docs/hugging_face.md."""
