"""What is asked and answered, in the words of OpenAI's API: one class for each object.

A parameter that is not here is refused. JSON null stands for a parameter that was left out.

common.py     what all requests have in common
requests.py   conversations and texts; responses.py: the Responses API
answers.py    answers to the first two
"""
