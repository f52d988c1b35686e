"""The processes of a run: how they find one another, and which rows each one feeds."""

from dsjax.processes.host_rows import HostShard
from dsjax.processes.join import initialize_processes

__all__ = ["HostShard", "initialize_processes"]
