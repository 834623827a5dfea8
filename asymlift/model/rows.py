"""Some samples of a batch: taken out, computed alone, and put back."""

from collections.abc import Sequence

import torch
from torch import Tensor

from asymlift.families.base import Text


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """On the device, without waiting for what it still computes."""
    if tensor.device == device:
        return tensor
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


class Rows:
    """Positions of samples in a batch of `count`. All of them are taken as they are."""

    def __init__(self, chosen: Sequence[int], count: int, device: torch.device) -> None:
        self.chosen, self.count, self.all = list(chosen), count, len(chosen) == count
        index = torch.tensor(self.chosen, dtype=torch.long)
        self.index = None if self.all else moved(index, device)

    def __len__(self) -> int:
        return len(self.chosen)

    def take(self, whole: Tensor) -> Tensor:
        return whole if self.index is None else whole.index_select(0, self.index)

    def put(self, whole: Tensor, part: Tensor) -> Tensor:
        """`whole` with these samples replaced."""
        return part if self.index is None else whole.index_copy(0, self.index, part)

    def spread(self, part: Tensor) -> Tensor:
        """These samples among zeros."""
        if self.index is None:
            return part
        return self.put(part.new_zeros(self.count, *part.shape[1:]), part)

    def take_text(self, text: Text) -> Text:
        return {
            name: self.take(value)
            if isinstance(value, Tensor)
            else [value[position] for position in self.chosen]
            for name, value in text.items()
        }
