"""How much memory a distillation takes, and where: found before there are weights or a GPU.

The models are made without memory and run, forward and backward, on tensors that are shapes alone;
what lives at each operation is added up. So is the loss, by its own code and by others' own.
"""
