"""The server image: vLLM on the loopback, and the agent that stands between it and everyone else.

`engine` starts vLLM once the agent has said with which model. `agent` fetches and checks base and adapters, loads them,
answers clients and probes, and says what it serves. `drain` is the engine container's preStop hook. The three share
one image and nothing else but the file of `handoff`.
"""
