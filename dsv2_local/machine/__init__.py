"""The machine: its cores, memory and NUMA nodes, and the speeds measured on it."""
