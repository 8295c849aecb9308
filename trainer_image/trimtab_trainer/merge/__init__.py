"""Folding adapters into their base, from storage to storage, a block of rows at a time.

Read downwards, each room uses only those below it: `job` (a whole merge), `verify` (the logits at the end), `units`
(what is written, in which file), `adapter` (what an adapter changes), `update` (the arithmetic), `architecture` (names
on disk and at run time), `checkpoint` (tensors in files), `tensorfile` (the format), `places` (folders near and far).
"""
