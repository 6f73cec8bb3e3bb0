"""A discrete-event simulator of a fleet: traces and workloads in, waiting, loads and memory use out.

The router, the placement, the eviction and the swapper are the gateway's own; what is simulated is the nodes, the time
and the loader's hands. Nothing here reads the wall's clock or opens a connection, but for `command`.
"""
