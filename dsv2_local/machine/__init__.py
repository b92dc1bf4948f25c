"""What this computer has and can do: cores, memory, NUMA nodes, and rates that were measured on it."""
