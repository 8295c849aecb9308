"""Rewards of grpo-python.yaml: kubectl create configmap rewards --from-file=examples/methods/rewards.py."""


def close(completions, solution, **columns):
    """1 for the right number, less the further away it is, 0 where no number is given."""
    said = [completion[0]["content"] for completion in completions]
    return [_closeness(text, wanted) for text, wanted in zip(said, solution, strict=True)]


def brief(completion_ids, **columns):
    """-0.01 for each token."""
    return [-0.01 * len(ids) for ids in completion_ids]


def _closeness(text, wanted):
    try:
        return 1 / (1 + abs(float(text.split()[-1]) - float(wanted)))
    except (IndexError, ValueError):
        return 0.0
