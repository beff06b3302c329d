import os

import torch

os.environ.setdefault("MPLBACKEND", "Agg")
torch.set_num_threads(1)  # the models here are too small to gain from more
