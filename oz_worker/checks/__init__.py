"""What `check` tries out: a file for each family of probes. They use the worker's own parts wherever there is one."""
