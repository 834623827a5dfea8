"""What is peculiar to Krea 2: scales around one, and the order of its words."""

import pytest
import torch

from asymlift.families import FAMILIES
from asymlift.model.loading import load_transformer, weightless_transformer
from tests.tiny import tiny_text, tiny_transformer


@pytest.mark.parametrize("dtype", ["stored", torch.bfloat16, torch.float64])
def test_scales_around_one_are_float32_however_they_are_stored(dtype, tmp_path):
    """1 + scale in bf16 would have 8 bits in all. diffusers' own loader says the same."""
    family, net = FAMILIES["krea2"], tiny_transformer("krea2").to(torch.bfloat16)
    net.save_pretrained(tmp_path / "transformer")
    stock = type(net).from_pretrained(tmp_path / "transformer", torch_dtype=torch.bfloat16)
    ours = load_transformer(tmp_path, family, dtype=dtype).state_dict()
    planned = weightless_transformer(
        dict(net.config), family, lambda _: torch.bfloat16, tmp_path
    ).state_dict()
    for key, tensor in stock.state_dict().items():
        assert planned[key].dtype == tensor.dtype, key
        assert ours[key].dtype == (dtype if dtype == torch.float64 else tensor.dtype), key
        assert torch.equal(ours[key].to(tensor.dtype), tensor)
    assert {t.dtype for t in planned.values()} == {torch.float32, torch.bfloat16}


@torch.no_grad()
def test_the_order_of_its_words_is_the_text_encoders_alone():
    """All words stand at the origin, so padding in their midst can be left out."""
    family, net = FAMILIES["krea2"], tiny_transformer("krea2")
    text, image = tiny_text("krea2", 1), torch.ones(1, 4, 4, 6)
    backwards = {key: value.flip(1) for key, value in text.items()}
    there, back = (family.run(net, image, torch.ones(1), t) for t in (text, backwards))
    torch.testing.assert_close(there, back)
