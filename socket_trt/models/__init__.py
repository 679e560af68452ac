"""Models: presets and families, checkpoints on disk or on the hub, and the project's own `tiny` model."""
