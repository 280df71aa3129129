"""Run recipes of mergekit, the YAML files of `mergekit-yaml`, by our merge methods; mergekit is not imported.

`recipe.py` (open it first) reads and runs a recipe, and `methods.py` finds our method of the same numbers.
"""
