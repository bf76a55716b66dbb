"""Data on disk to batches. Reading is ``datasets``' work."""
