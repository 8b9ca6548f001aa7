"""nanope/hf.py: models that transformers does not have. tests/scripts/test_export.py has those that it has."""

import pytest

from model import GPT, GPTConfig
from nanope.hf import as_transformers


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
