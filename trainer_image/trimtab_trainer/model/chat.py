"""The special tokens of a tokenizer that we train: separators of documents and turns."""

END_OF_TEXT = "<|endoftext|>"
"""Separates documents and pads."""
TURN_BEGINS = "<|im_start|>"
"""Begins a turn; the role follows."""
TURN_ENDS = "<|im_end|>"
"""Ends a turn."""
SPECIAL = (END_OF_TEXT, TURN_BEGINS, TURN_ENDS)
CHATML_TOKENS = {"eos_token": END_OF_TEXT, "pad_token": END_OF_TEXT}
"""By the names that templates use."""
