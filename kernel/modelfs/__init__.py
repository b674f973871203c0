"""The model filesystem: models as manifests over content-addressed blobs.

names, store, catalogue   what the kernel uses; they import nothing heavy
importer                  a short-lived process that brings a model in; all the rest is part of it
"""
