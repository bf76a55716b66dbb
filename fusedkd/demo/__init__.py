"""``fusedkd demo``: a whole distillation on real text, small enough for two cores."""
