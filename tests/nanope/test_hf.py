"""nanope/hf.py: models that transformers does not have. tests/scripts/test_export.py has those that it has."""

import pytest

from model import GPT, GPTConfig
from nanope.hf import as_transformers, partial_rotary_factor


@pytest.mark.parametrize(
    "fields, words",
    [
        *(
            (dict(pos=pos), f"{pos} cannot be exported: .*learned, rope and crope can")
            for pos in ("comrope", "carope", "alibi", "sinusoidal", "none")
        ),
        (dict(pos="rope+alibi"), "no architecture of transformers has it"),
        (dict(pos=["rope", "none"]), "no architecture of transformers has it"),
        (dict(window=[8, 0]), "window .* cannot be exported"),
        (dict(pos="rope", pos_options={"explicit": True}), "explicit frequencies cannot be exported"),
    ],
)
def test_what_transformers_does_not_have(fields, words):
    with pytest.raises(ValueError, match=words):
        as_transformers(GPT(GPTConfig(24, 64, 2, 2, 16, **fields)), eot=63)


def test_the_reader_of_a_partial_rotary_factor_finds_the_width():
    """int(D · factor), as transformers computes it, for every width of every head up to 512 channels."""
    wrong = [(width, D) for D in range(2, 513, 2) for width in range(2, D + 1, 2) if int(D * (width / D)) != width]
    assert (30, 44) in wrong and len(wrong) > 100  # width / D alone is not enough
    for D in range(2, 513, 2):
        for width in range(2, D + 1, 2):
            factor = partial_rotary_factor(width, D)
            assert int(D * factor) == width and 0 < factor <= 1
            assert factor == width / D or (width, D) in wrong
