"""What prepare() has done to a model."""

from dataclasses import dataclass

from torch import nn

MARK = "_specdec_prepared"
"""The attribute of the model that says so."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """What prepare() did to a model; kept on the model.

    weights: None (float), "int8", "int4", or "gguf" of a model whose blocks `models.load` has taken from such a file.
    activations: "float", or "int8" where the rows of quantised products are quantised too.
    """

    weights: str | None
    num_linears: int
    num_fused_layers: int
    activations: str = "float"


def prepared(model: nn.Module) -> Prepared | None:
    """What `prepare` has done to a model, None if nothing: what is measured of the model holds only as long as this."""
    return model.__dict__.get(MARK)
