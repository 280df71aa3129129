"""Run mergekit recipes, the YAML files of `mergekit-yaml`, with the merge methods of this package; mergekit itself is
neither needed nor imported.

Start with `run.py`: `merge_recipe` writes the checkpoint of a recipe that `read_recipe` in `parse.py` has checked.
"""
