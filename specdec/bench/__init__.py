"""What `specdec bench` measures with: prompts, methods, peers, the harness, and what it reports.

methods, peers/           what can be asked for by name; building makes it what harness runs
suite                     the prompts
running, harness          one timed call; all of them, in turns
equality, intervals       is it the same, and how sure is the speed-up
report, document          rows of numbers; the rows with what they depend on (schema.json)
tables, plots             the document for people
"""
