"""The processes of a run: how they find one another, and which rows each one feeds."""

from dsjax.processes.host_rows import HostShard
from dsjax.processes.host_times import HostTimes
from dsjax.processes.join import initialize_processes
from dsjax.processes.watch import Watch

__all__ = ["HostShard", "HostTimes", "Watch", "initialize_processes"]
