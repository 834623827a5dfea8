"""One process under any launcher: says who it is, after it has met the others."""

import json
import os
import socket

import torch

from asymlift.runtime import dist


def main() -> None:
    torch.set_num_threads(1)
    ranks = dist.discover()
    dist.join(ranks, torch.device("cpu"), 120)
    total = dist.summed(torch.tensor(float(ranks.rank + 1))).item()
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    said = {"ranks": [ranks.rank, ranks.world, ranks.local], "total": total}
    said["torch"] = [int(os.environ[name]) for name in names]
    os.write(1, f"{json.dumps(said)} on {socket.gethostname()}\n".encode())
    dist.end_process(0)


if __name__ == "__main__":
    main()
