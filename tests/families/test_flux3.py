"""FLUX.3: what its folder must not hold."""

import pytest

from asymlift.errors import BadData
from asymlift.families.flux3 import FLUX3
from tests.tiny import tiny_transformer, tiny_vae


def test_a_step_distilled_transformer_is_refused():
    distilled, vae = tiny_transformer("flux3", flow_map=True), tiny_vae("flux3")
    with pytest.raises(BadData, match="is a flow map, told two times, and cannot be lifted"):
        FLUX3.geometry(dict(distilled.config), dict(vae.config))
