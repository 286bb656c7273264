"""What hypothesis draws from."""

from hypothesis import strategies as st

from trees import ROOT, TokenTree


@st.composite
def token_trees(draw: st.DrawFn, *, max_nodes: int = 8, vocab_size: int = 64) -> TokenTree:
    num_nodes = draw(st.integers(0, max_nodes))
    return TokenTree(
        tokens=draw(st.lists(st.integers(0, vocab_size - 1), min_size=num_nodes, max_size=num_nodes)),
        parents=[draw(st.integers(ROOT, node - 1)) for node in range(num_nodes)],
    )
