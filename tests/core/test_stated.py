"""A config may repeat what its class says of itself; constructors do not see it."""

import pytest
from hydra.utils import instantiate

from t2i_rl.core.contracts import ImageModel
from t2i_rl.core.errors import UserError
from t2i_rl.core.numbers import Count, parameters_of


class Painter(ImageModel):
    """A model of a user's own."""

    family, kind = "diffusion", "oil"

    def __init__(self, size: Count = 32):
        super().__init__()
        self.size = size


class Copyist(Painter):
    """It hands on what it is given."""

    def __init__(self, colours: Count = 3, **options):
        super().__init__(**options)
        self.colours = colours


@pytest.mark.parametrize("repeated", [{}, {"family": "diffusion"}, {"family": "diffusion", "kind": "oil"}])
@pytest.mark.parametrize(("kind", "given"), [("Painter", {"size": 64}), ("Copyist", {"size": 64, "colours": 5})])
def test_a_part_is_made_whether_its_config_repeats_its_class_or_not(kind, given, repeated):
    made = instantiate({"_target_": f"{__name__}.{kind}", **given, **repeated})
    assert {name: getattr(made, name) for name in given} == given and made.kind == "oil"
    assert set(parameters_of(type(made))) == set(given)


def test_a_config_that_says_otherwise_than_its_class_is_refused():
    Copyist.check_stated({"family": "diffusion", "kind": "sd15", "size": 32}, "model")  # a kind may be chosen
    with pytest.raises(UserError, match="^model.family must be what Copyist says of itself, diffusion$"):
        Copyist.check_stated({"family": "autoregressive"}, "model")
