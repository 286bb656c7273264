"""`specdec chat`: a conversation in the terminal.

    command.py       the options of the command
    session.py       ties the rooms below: read, obey or reply, again
    dialogue.py      what was said, by turns; conversation.py: with a model of this process, whose states are kept
    remote.py        with a model of a server
    settings.py      what /set changes; transcript.py: conversations as files
    streamer.py      tokens become text, and which of them were drafted; reply.py: what a reply is
    speakers.py      the model that speaks, and what drafts for it
    commands.py      what can be typed after a slash
    rendering.py     replies on the screen: markdown.py makes lines of them
    reading.py       lines from a terminal or a pipe; keyboard.py: the keys while a reply is written

A conversation knows no terminal, rendering knows no model.
"""

from specdec.cli.chat.command import register

__all__ = ["register"]
