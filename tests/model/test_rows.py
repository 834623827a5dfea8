import torch

from asymlift.model.rows import Rows

CPU = torch.device("cpu")


def test_some_rows_are_taken_and_put_back_with_their_gradients():
    whole = torch.arange(8.0).view(4, 2).requires_grad_()
    rows = Rows([3, 1], 4, CPU)
    part = rows.take(whole)
    assert part.tolist() == [[6, 7], [2, 3]] and len(rows) == 2
    assert rows.put(whole, 10 * part).tolist() == [[0, 1], [20, 30], [4, 5], [60, 70]]
    assert rows.spread(part).tolist() == [[0, 0], [2, 3], [0, 0], [6, 7]]
    rows.spread(part).sum().backward()
    assert whole.grad.tolist() == [[0, 0], [1, 1], [0, 0], [1, 1]]


def test_all_rows_are_taken_as_they_are():
    whole, rows = torch.ones(3, 2), Rows([0, 1, 2], 3, CPU)
    assert rows.take(whole) is whole and rows.spread(whole) is whole
    assert rows.put(torch.zeros(3, 2), whole) is whole


def test_ragged_text_is_taken_sample_by_sample():
    text = {"words": [torch.full((n, 1), n) for n in range(3)], "pooled": torch.arange(3)}
    taken = Rows([2, 0], 3, CPU).take_text(text)
    assert [len(one) for one in taken["words"]] == [2, 0] and taken["pooled"].tolist() == [2, 0]
