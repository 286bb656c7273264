"""Trees for people."""

from rich.console import Console

from trees import ROOT, TokenTree

TREE = TokenTree(tokens=[104, 105, 33], parents=[ROOT, 0, ROOT], probs=[0.5, 1, 0.25])


def printed(tree: object, **options: object) -> str:
    console = Console(width=40, **options)
    with console.capture() as capture:
        console.print(tree)
    return capture.get()


def test_rich_prints_a_tree() -> None:
    assert printed(TREE).splitlines() == [
        "root",
        "├── 104  q=0.500",
        "│   └── 105  q=1.000",
        "└── 33  q=0.250",
    ]


def test_text_is_no_markup_and_accepted_nodes_stand_out() -> None:
    tree = TREE.to_rich(decode=lambda token: f"[{chr(token)}]", accepted=[0, 1])
    lines = printed(tree, force_terminal=True, color_system="standard").splitlines()
    assert ["\x1b[1;32m" in line for line in lines] == [False, True, True, False]
    assert "[h]" in lines[1]
