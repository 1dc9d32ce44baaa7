"""The op families: attention, contrastive, packing. They do not import each other."""
