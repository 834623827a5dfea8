"""One thread, however pytest is started: sums in another order differ in their last bits."""

import os

import torch

os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start
torch.set_num_threads(1)
