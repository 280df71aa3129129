"""Answer requests over HTTP, each with its own expert of a library; a router finds one where a request names none.

Open `engine.py` first, where rows with experts of their own share the passes of a model. `models.py` says what the
`model` of a request means. Nothing here changes a file.
"""
