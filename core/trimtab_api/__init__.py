"""What every part of Trimtab agrees on: the kinds, their names, their conditions, and what crosses a pod's wall."""
