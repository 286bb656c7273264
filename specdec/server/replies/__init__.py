"""What a model writes besides text: reasoning and calls of tools, as its chat template has taught it.

styles.py   how a template writes calls: Hermes, Llama, Mistral; how each is parsed and forced
scanner.py  one call, character by character
parser.py   a reply as it comes: text, reasoning, calls
format.py   which of this a model knows
grammar.py  replies that are held to calls or to a document, as a Lark grammar of llguidance
"""
