"""A real one-node Kubernetes on this computer, for people without a cluster and for the tests.

Nothing here is part of the product: the lab imports nothing of it, uses the standard library only, and is gone
without a trace after `make cluster-down`. Run it as `python3 -m lab VERB` from the root of the repository.
"""
