"""mergekit: its recipes (the YAML of `mergekit-yaml`), read and run with the merge methods of this package.

mergekit itself is neither needed nor imported. `reading` turns a file into a checked `configuration`, `settings` and
`places` give a parameter's value for one weight, `recipe` gives the merge method for it, `inputs` the models' tensors,
`run` writes the merged checkpoint, and `differences` says where the numbers may not be mergekit's.
"""
