"""Token trees: the data structure and the policies that grow them. Knows tensors, knows no model."""

from trees.chain import Chain
from trees.dynamic import DySpec, DySpecThreshold
from trees.growth import Draft, Grower, GrowthPolicy, Layer
from trees.static import Fixed, Sequoia, count_ranks, measure_acceptance
from trees.tree import ROOT, TokenTree, TreeBatch

__all__ = [
    "ROOT",
    "Chain",
    "Draft",
    "DySpec",
    "DySpecThreshold",
    "Fixed",
    "Grower",
    "GrowthPolicy",
    "Layer",
    "Sequoia",
    "TokenTree",
    "TreeBatch",
    "count_ranks",
    "measure_acceptance",
]
