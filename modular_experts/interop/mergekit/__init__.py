"""Run mergekit recipes, the YAML files of `mergekit-yaml`, with the merge methods of this package; mergekit itself is
neither needed nor imported.

Start with `run.py`: `merge_recipe` writes the merged checkpoint. Before that, `parse` turns a file into a checked
`recipe`, and `methods` maps each merge method of mergekit to ours; `inputs` reads the models that a recipe names,
`difference` how far one weight of a model is from the base, and `deviations` lists where our numbers may not be
mergekit's.
"""
