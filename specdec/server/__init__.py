"""`specdec serve`: OpenAI's API on the engine, and a page. Needs the extra `serve`.

options.py      where the server listens, and what it allows
protocol/       what is asked and answered, as classes; errors.py: answers that are errors
access.py       API key, Host header, slow bodies, before anything else is done; logs.py: a line for each request
app.py          routes; pages.py, page/: what a browser is shown
service.py      what a request goes through: planned, submitted, known until it is closed
preprocessing.py  templates, tokens and grammars of a request; sandbox.py, sandbox_worker.py: those that may never end
planning.py     from a request of the API to requests of the engine: what can be refused is refused there
processors.py   penalties; grammar.py: JSON schemas
jobs.py         generations under way, from the engine's thread into the event loop; origins.py: who wrote what
replies/        reasoning and calls of tools in what a model writes
answers.py      whole answers and streams; forms.py, responses.py: how they are written
metrics.py      what /metrics tells
running.py      the socket, the engine's thread, the end
"""
