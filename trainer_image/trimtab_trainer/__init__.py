"""What runs in a trainer pod: rows and a model in, an artifact with a manifest out, with or without a cluster."""
