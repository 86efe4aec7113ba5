"""Run folders on disk: versions, checkpoints, records and the hash of their settings."""
