"""Make a smaller base without training: search which parts to remove, correct the layers that read them.

Open `compress.py` first, which takes these steps. `removable.py` knows the parts of a model and cuts them out,
`ranking.py` ranks them, and `reform.py` corrects the layers that read them. `candidates.py` defines the candidates,
and `systems/evolution.py` searches. The result is an ordinary checkpoint.
"""
