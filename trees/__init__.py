"""Token trees: the data structure and the policies that grow them. Knows tensors, knows no model."""

from trees.growth import Chain, Draft, Grower, GrowthPolicy, Layer
from trees.tree import ROOT, TokenTree, TreeBatch

__all__ = ["ROOT", "Chain", "Draft", "Grower", "GrowthPolicy", "Layer", "TokenTree", "TreeBatch"]
