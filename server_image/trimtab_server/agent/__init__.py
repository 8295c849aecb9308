"""The agent: one asyncio program beside the engine that owns everything between storage, engine and clients.

Rooms, from the outside in: `program` wires them; `desired` learns what to serve; `inputs` brings models and adapters to
the local disk; `checks` refuses what the engine could not serve; `keeper` keeps one adapter in the engine, `base` the
model under it; `engine` is the only client of the engine's administration and watches whether it lives; `table` says
which version answers under a name; `proxy` serves clients, `operations` serves probes, metrics and the drain;
`report` tells the operator. Truth is the engine: every round compares with its GET /v1/models.
"""
