"""8-bit codes: near the numbers they stand for, and exact where the numbers came from codes."""

import pytest
import torch

from asymlift.maths.blockwise import dequantize, quantize

BLOCK = 8
# As in use: dense near 0; the largest entry is 1, the smallest of a signed table is not -1.
POSITIVE = torch.cat([10.0**-k * torch.linspace(0.1, 1, 22)[1:] for k in range(5, -1, -1)])
SIGNED = torch.cat([-POSITIVE.flip(0)[1:], torch.zeros(1), POSITIVE])
UNSIGNED = torch.cat([torch.zeros(1), POSITIVE])


def numbers(table: torch.Tensor, count: int) -> torch.Tensor:
    sizes = 10.0 ** torch.randint(-12, 3, (-(-count // BLOCK),)).repeat_interleave(BLOCK)[:count]
    values = torch.randn(count) * sizes
    return values if table[0] < 0 else values.abs()


@pytest.mark.parametrize("table", [SIGNED, UNSIGNED], ids=["signed", "unsigned"])
@pytest.mark.parametrize("count", [BLOCK, 4000, 4001, 4007])
def test_numbers_are_found_again_to_within_the_steps_of_the_table(table, count):
    values = numbers(table, count)

    codes, scales = quantize(values, table, BLOCK)
    again = dequantize(codes, scales, table, BLOCK)

    peaks = scales.repeat_interleave(BLOCK)[:count]
    step = table.diff().max()
    # A signed table ends one step short of -1, and numbers beyond its end have to come back.
    limit = torch.where(values < table[0] * peaks, 1.01, 0.51) * step * peaks
    assert (codes.dtype, codes.shape, len(scales)) == (torch.uint8, (count,), -(-count // BLOCK))
    assert ((again - values).abs() <= limit).all()


def test_what_came_out_of_codes_comes_out_again_to_the_bit():
    """Whatever the signs of the largest numbers, and with scales of every size."""
    scales = (torch.rand(1001) + 0.5) * 10.0 ** torch.randint(-12, 3, (1001,))
    for table, first in [(SIGNED, 0), (SIGNED, len(SIGNED) - 1), (UNSIGNED, len(UNSIGNED) - 1)]:
        codes = torch.randint(len(table) // 4, 3 * len(table) // 4, (8003,))
        codes[::BLOCK] = first  # the largest number of its block, and of this sign
        values = dequantize(codes, scales, table, BLOCK)

        again = dequantize(*quantize(values, table, BLOCK), table, BLOCK)

        assert torch.equal(again, values)


def test_a_block_of_zeros_stays_zero():
    again = dequantize(*quantize(torch.zeros(20), SIGNED, BLOCK), SIGNED, BLOCK)
    assert torch.equal(again, torch.zeros(20))
