"""Make a smaller base without training: search which parts to remove, correct the layers that read them.

Open `compress.py` first, which takes these steps. `removable.py` knows the parts of a model and cuts them out,
`candidates.py` ranks them and defines the candidates, `systems/evolution.py` searches, and `reform.py` corrects the
layers that read them. The result is an ordinary checkpoint.
"""
