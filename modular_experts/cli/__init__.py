"""The command line. One file per command; nothing else in the package imports from here, and jsonargparse lives only
here.
"""
