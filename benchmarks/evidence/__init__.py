"""Does distillation help? See run.py."""
