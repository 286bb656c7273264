"""`specdec chat`: a conversation in the terminal.

    command.py       the options of the command
    session.py       ties the rooms below: read, obey or reply, again
    conversation.py  what was said, the prompt that the template makes of it, the states kept from turn to turn
    settings.py      what /set changes; transcript.py: conversations as files
    streamer.py      tokens become text, and which of them were drafted; reply.py: what a reply is
    speakers.py      the model that speaks, and what drafts for it
    commands.py      what can be typed after a slash
    rendering.py     replies on the screen: markdown.py makes lines, live_lines.py keeps the last ones up to date
    reading.py       lines from a terminal or a pipe; keyboard.py: the keys while a reply is written

A conversation knows no terminal, rendering knows no model.
"""

from specdec.cli.chat.command import register

__all__ = ["register"]
