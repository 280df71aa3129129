"""Make a smaller base without training: search which parts to remove, correct the layers that read them.

`compress.py` conducts it; open it first. `removable.py` knows the parts of a model and cuts them out, `ranking.py`
ranks them, `reform.py` corrects the layers that read them, and `text.py` reads the rows and measures perplexity. The
search itself is `tuning/evolution.py`'s. The result is an ordinary checkpoint. Nothing here trains.
"""
