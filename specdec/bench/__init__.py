"""What `specdec bench` measures with: prompts, methods, peers, the harness, and what it reports.

methods, peers/           what can be asked for by name; building makes it what harness runs
running, harness          one timed call; all of them, in turns
intervals                 how sure is the speed-up
report, document          rows of numbers; the rows with what they depend on (schema.json)
tables, plots             the document for people
"""
