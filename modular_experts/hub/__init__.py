"""Push experts and a model card about them to the Hugging Face hub, and pull them, checking every byte.

`push.py` and `pull.py` are the two directions, `card.py` writes the page of a repository, and `repository.py` asks the
hub and turns its errors into sentences. This room does not fetch base models; `base/` does.
"""
