"""The model that is tuned: from a folder or from random weights, with its tokenizer, and an adapter if one is wanted."""
