"""What `bench.copy_bits` rounds to, and what it makes of an agreement."""

import pytest
import torch

from bench.copy_bits import GROUP, gain, rounded


@pytest.mark.parametrize("bits", [3, 4])
def test_weights_on_a_grid_of_so_many_levels_stay(bits):
    generator = torch.Generator().manual_seed(0)
    codes_NK = torch.randint(0, 2**bits, (4, 2 * GROUP), generator=generator).float()
    codes_NK[:, ::GROUP], codes_NK[:, 1::GROUP] = 0, 2**bits - 1
    weight_NK = codes_NK * 0.25 - 0.5
    torch.testing.assert_close(rounded(weight_NK, bits), weight_NK)


def test_a_bit_less_doubles_the_error():
    weight_NK = torch.randn(16, 3 * GROUP - 5, generator=torch.Generator().manual_seed(0))
    errors = [(rounded(weight_NK, bits) - weight_NK).norm().item() for bits in (3, 4)]
    assert 1.7 < errors[0] / errors[1] < 2.5


def test_a_chain_gains_what_its_tokens_are_worth():
    assert gain(0.0, step=0.2, verify=1.1) == 1
    assert gain(1.0, step=0.0, verify=1.0) == 17
    assert gain(0.5, step=0.1, verify=1.0) == pytest.approx(1.75 / 1.2)
