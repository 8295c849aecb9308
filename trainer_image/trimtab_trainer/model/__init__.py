"""The model that is tuned: from a folder or from random weights, its tokenizer, and an adapter if one is wanted."""
