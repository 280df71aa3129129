"""Compare the package with an independent reference on random cases, for as long as one likes: `make soak`.

`reference/` computes what should come out, in plain PyTorch, transformers and safetensors, and imports nothing of the
package. Each function of `families/` draws one random case, calls the package as a user would, and compares. A family
and a seed are a case. Read `case.py` first; `__main__.py` runs cases and prints them.
"""
