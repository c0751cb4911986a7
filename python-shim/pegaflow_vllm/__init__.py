"""The vLLM side of pegaflow: saves and loads KV chunks through PegaEngine.

    EngineCore process                               each Worker process
    PegaConnector (scheduler role)                   PegaConnector (worker role)
      | who takes part, attempts, seal                 | stores submitted at once, failed loads
    Manager: lookup / store / leases                 Worker: copies blocks <-> arena rows
      | Client: one blocking session                   | Client: one session with the arena mapped
      +---------------- engine.sock (docs/protocol.md) +

The scheduler asks the index and passes refs (slot, generation) to the workers inside vLLM's own step metadata;
the workers copy and commit. Nothing here may stop vLLM: every failure ends as a miss, a store not done or a
load reported as failed, which vLLM recomputes.

vLLM imports `pegaflow_vllm.connector` (PegaConnector) and `pegaflow_vllm.spec` (PegaSpec) by name.
"""

__version__ = "0.1.0"
