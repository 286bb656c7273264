"""Token trees: the data structure and the policies that grow them. Knows tensors, knows no model."""

from trees.calibration import Calibration, count_shares, measure_calibration
from trees.chain import Chain
from trees.confidence_chain import ConfidentChain
from trees.draft import Draft, Part
from trees.dynamic import DySpec, DySpecThreshold
from trees.gain_limited import GainLimitedChain, leaf_confidence
from trees.merging import Merged, Merger, merge
from trees.policy import Grower, GrowthPolicy, Layer, Round
from trees.ragged import Ragged
from trees.side_leaves import chain_length
from trees.static import Fixed, Sequoia, count_ranks, measure_acceptance
from trees.tree import ROOT, TokenTree, TreeBatch
from trees.tree_builder import GrowingTrees

__all__ = [
    "ROOT",
    "Calibration",
    "Chain",
    "ConfidentChain",
    "Draft",
    "DySpec",
    "DySpecThreshold",
    "Fixed",
    "GainLimitedChain",
    "Grower",
    "GrowingTrees",
    "GrowthPolicy",
    "Layer",
    "Merged",
    "Merger",
    "Part",
    "Ragged",
    "Round",
    "Sequoia",
    "TokenTree",
    "TreeBatch",
    "chain_length",
    "count_ranks",
    "count_shares",
    "leaf_confidence",
    "measure_acceptance",
    "measure_calibration",
    "merge",
]
